"""What the tests of Ray Serve ask an application at port 8000 of this node.

`python -m tests.e2e.serve_client [PROMPT [ROUTE [MODEL]]]`: the text after a prompt of one's own, of the application at
a route and of a model, or after those of `ask`. `--load`: ask until this process is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys

import openai

from demo.train.recitation import PROMPTS
from tests.e2e.generate import MARKER

SERVER = "http://127.0.0.1:8000"
URL = f"{SERVER}/v1"
CONCURRENT = 20


async def ask() -> dict[str, object]:
    """Return the models, and the texts of one completion, of one that is streamed, and of many simultaneously."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", timeout=300, max_retries=0) as client:
        models = [model.id async for model in client.models.list()]

        async def complete(prompt: str) -> str:
            answer = await client.completions.create(model=models[0], prompt=prompt, temperature=0, max_tokens=200)
            return answer.choices[0].text

        async def stream(prompt: str) -> list[str]:
            answer = await client.completions.create(
                model=models[0], prompt=prompt, temperature=0, max_tokens=200, stream=True
            )
            return [chunk.choices[0].text async for chunk in answer]

        return {
            "models": models,
            "streamed": await stream(PROMPTS[-1]),
            "texts": await asyncio.gather(*(complete(PROMPTS[-1 - each % 2]) for each in range(CONCURRENT))),
        }


def complete(prompt: str, route: str = "", model: str = "") -> str:
    """Return the text after one prompt, of the first model unless one is named."""
    client = openai.OpenAI(base_url=f"{SERVER}{route}/v1", api_key="none", timeout=300, max_retries=0)
    model = model or client.models.list().data[0].id
    return client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=200).choices[0].text


def main(arguments: list[str]) -> None:
    if arguments == ["--load"]:
        while True:
            asyncio.run(ask())
    elif arguments:
        print(f"TEXT {complete(*arguments)!r}")
    else:
        print(MARKER + json.dumps(asyncio.run(ask())))


if __name__ == "__main__":
    main(sys.argv[1:])
