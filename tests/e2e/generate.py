"""Runs one engine on Ray and prints what it generated, as JSON after a marker. Started on a node of a cluster by tests.

python -m tests.e2e.generate '{"model": PATH, "tp": 2, "pp": 1, "eager": false, "dtype": "float32",
                                    "singles": [0]}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARKER = "GENERATED "
CAPTURED = (1, 2)
"""Batch sizes with a graph: larger batches are decoded without, so that one engine shows both."""


def engine(options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        model=options["model"],
        dtype=options["dtype"],
        tensor_parallel_size=options["tp"],
        pipeline_parallel_size=options["pp"],
        distributed_executor_backend="ray",
        enforce_eager=options["eager"],
        compilation_config=None if options["eager"] else {"cudagraph_capture_sizes": list(CAPTURED)},
        max_model_len=1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
        worker_extension_cls="tests.e2e.facts.WorkerFacts",
        disable_log_stats=True,
        seed=0,
    )


def generate(llm: Any, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return greedy tokens and their log-probabilities for each entry of reference.json, all in one batch."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(temperature=0, max_tokens=len(entry["tokens"]), logprobs=1, ignore_eos=entry["kind"] == "probe")
        for entry in entries
    ]
    prompts = [{"prompt_token_ids": entry["prompt_tokens"]} for entry in entries]
    results = [output.outputs[0] for output in llm.generate(prompts, parameters, use_tqdm=False)]
    return [
        {
            "tokens": list(result.token_ids),
            "logprobs": [
                chosen[token].logprob for token, chosen in zip(result.token_ids, result.logprobs, strict=True)
            ],
        }
        for result in results
    ]


def main(options: dict[str, Any]) -> dict[str, Any]:
    from demo.train.reference import stored_reference

    entries: list[dict[str, Any]] = [dict(e) for e in stored_reference(Path(options["model"]), options["dtype"])]
    llm = engine(options)
    llm.collective_rpc("count_replays")
    batch = generate(llm, entries)
    between = llm.collective_rpc("facts")
    singles = [generate(llm, [entries[index]])[0] for index in options["singles"]]
    return {"batch": batch, "singles": singles, "batch_facts": between, "facts": llm.collective_rpc("facts")}


if __name__ == "__main__":
    print(MARKER + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
