"""A dataset of prompts through Ray Data LLM: `python -m tests.e2e.data_batch OPTIONS`, with options in JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from tests.e2e.generate import MARKER


def main(model: str, prompts: list[str], concurrency: int, **engine_kwargs: Any) -> None:
    """Print each row's prompt and text."""
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine_kwargs,
        placement_group_config={"bundle_per_worker": {"CPU": 1, "NPU": 1}},
        chat_template_stage=False,
        batch_size=2,
        concurrency=(concurrency, concurrency),
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["item"], "sampling_params": {"temperature": 0, "max_tokens": 400}},
        postprocess=lambda row: {"prompt": row["prompt"], "text": row["generated_text"]},
    )
    dataset = ray.data.from_items(prompts, override_num_blocks=len(prompts) // 4)
    for row in processor(dataset).iter_rows():
        print(MARKER + json.dumps([row["prompt"], row["text"]]), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
