"""Complete prompts with Ray Data LLM on two NPUs: `python batch.py MODEL` on a node of the cluster."""

import sys

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

PROMPTS = ["Beautiful is better than ugly.\n", "Explicit is better than implicit.\n"]

config = vLLMEngineProcessorConfig(
    model_source=sys.argv[1],
    engine_kwargs={"tensor_parallel_size": 2, "max_model_len": 512},
    placement_group_config={"bundle_per_worker": {"CPU": 1, "NPU": 1}},  # without it Ray asks for GPUs
    chat_template_stage=False,
    batch_size=8,
    concurrency=1,
)

if __name__ == "__main__":
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["item"], "sampling_params": {"temperature": 0, "max_tokens": 100}},
        postprocess=lambda row: {"prompt": row["prompt"], "text": row["generated_text"]},
    )
    for row in processor(ray.data.from_items(PROMPTS)).take_all():
        print(repr(row["prompt"] + row["text"]))
