"""Ask a model by a handle of Ray Serve, without HTTP: `python deployment.py MODEL` on a node of the cluster."""

import asyncio
import sys
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.openai_api_models import CompletionRequest

llm_config = LLMConfig(
    model_loading_config={"model_id": "my-model", "model_source": sys.argv[1]},
    engine_kwargs={"tensor_parallel_size": 2, "max_model_len": 512},
)


async def ask(handle: Any, prompt: str) -> str:
    """Return the text with which the model continues a prompt."""
    request = CompletionRequest(model="my-model", prompt=prompt, max_tokens=100, temperature=0)
    answers = [answer async for answer in handle.options(stream=True).completions.remote(request)]
    return "".join(choice.text for answer in answers for choice in answer.choices)


if __name__ == "__main__":
    handle = serve.run(build_llm_deployment(llm_config))
    print("answer:", repr(asyncio.run(ask(handle, "Beautiful is"))))
    serve.shutdown()
