"""One engine with a model, for the acceptance: `python -m tests.hardware.engine OPTIONS`, JSON in and out."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

MARKER = "ENGINE "
PROMPTS = ("The capital of France is", "Beautiful is better than", "1, 2, 3, 4,", "In the beginning")
NEW_TOKENS = 64
REQUESTS = 16
ROUNDS = 3


async def measure(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the engine generates greedily, seconds until it was ready, and tokens per second of each round."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    began = time.monotonic()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, max_model_len=512, **options))
    try:
        ready = time.monotonic() - began
        texts = [text for text, _ in await _generate(engine, PROMPTS)]
        rates = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            answers = await _generate(engine, [PROMPTS[0]] * REQUESTS, ignore_eos=True)
            rates.append(sum(tokens for _, tokens in answers) / (time.monotonic() - began))
    finally:
        engine.shutdown()
    return {"texts": texts, "ready_s": ready, "tokens_per_s": rates}


async def _generate(engine: Any, prompts: list[str] | tuple[str, ...], **sampling: Any) -> list[tuple[str, int]]:
    """Return the text for each prompt and its number of tokens, all of them requested at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def answer(prompt: str) -> tuple[str, int]:
        params = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, output_kind=RequestOutputKind.FINAL_ONLY, **sampling
        )
        async for output in engine.generate(prompt, params, request_id=f"{next(_ids)}"):
            found = output.outputs[0]
        return found.text, len(found.token_ids)

    return list(await asyncio.gather(*map(answer, prompts)))


_ids = iter(range(sys.maxsize))

if __name__ == "__main__":
    print(MARKER + json.dumps(asyncio.run(measure(**json.loads(sys.argv[1])))), flush=True)
