"""One engine with a model, for the acceptance: `python -m tests.hardware.engine OPTIONS`, JSON in and out."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

MARKER = "ENGINE "
PROMPTS = ("The capital of France is", "Beautiful is better than", "1, 2, 3, 4,", "In the beginning")
NEW_TOKENS = 64
REQUESTS = 16
ROUNDS = 3


def main(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the engine generates greedily, seconds until it was ready, and tokens per second of each round."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(model, max_model_len=512, **options)
    ready = time.monotonic() - began
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    texts = [answer.outputs[0].text for answer in llm.generate(list(PROMPTS), sampling, use_tqdm=False)]
    full = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    rates = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        answers = llm.generate([PROMPTS[0]] * REQUESTS, full, use_tqdm=False)
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        rates.append(tokens / (time.monotonic() - began))
    return {"texts": texts, "ready_s": ready, "tokens_per_s": rates}


if __name__ == "__main__":
    print(MARKER + json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
