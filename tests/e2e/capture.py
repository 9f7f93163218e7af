"""Runs one engine with graphs on Ray and prints what its workers captured and generated, as JSON after a marker.

python -m tests.e2e.capture '{"model": PATH, "tp": 2, "sizes": [1, 2, 4, 8], "stages": []}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.facts import WorkerFacts
from tests.e2e.generate import MARKER, generate


class GraphFacts(WorkerFacts):
    """Mixed into vllm-ascend's worker: its graphs, their replays, and the streams that its process holds."""

    def graph_facts(self) -> dict[str, Any]:
        """Sizes with a graph, the mode, and what the software NPU counts for this process."""
        import os

        from softnpu.node_table import read_node_table
        from vllm_ascend.compilation import acl_graph

        runner = self.model_runner  # type: ignore[attr-defined]
        entries = [entry for wrapper in acl_graph._acl_graph_wrappers for entry in wrapper.concrete_aclgraph_entries]
        return {
            "sizes": sorted(entry.num_tokens for entry in entries),
            "mode": runner.compilation_config.cudagraph_mode.name,
            "streams": sum(held.streams for held in read_node_table() if held.pid == os.getpid()),
            "memory": sum(held.memory for held in read_node_table() if held.pid == os.getpid()),
            "replays": getattr(self, "replays", 0),
        }

    def release_graphs(self) -> None:
        """As an orderly end or a change of groups does."""
        from vllm_ray_ascend import acl_graphs

        acl_graphs.release(self)

    def recapture_graphs(self) -> None:
        """As after a change of groups."""
        from vllm_ray_ascend import acl_graphs

        acl_graphs.recapture(self)


def engine(options: dict[str, Any]) -> Any:
    from vllm import LLM

    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": options["sizes"]}
    return LLM(
        model=options["model"],
        dtype="float32",
        tensor_parallel_size=options["tp"],
        distributed_executor_backend="ray",
        compilation_config=graphs,
        max_model_len=512,
        max_num_seqs=max(options["sizes"]),
        kv_cache_memory_bytes=32 << 20,
        worker_extension_cls="tests.e2e.capture.GraphFacts",
        enable_sleep_mode="sleep" in options["stages"],
        additional_config={"weight_nz_mode": 0},
        disable_log_stats=True,
        seed=0,
    )


def main(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record for each stage: after the startup, and after each of the given ``stages``."""
    from demo.train.reference import stored_reference

    entries = stored_reference(Path(options["model"]), "float32")
    entry: dict[str, Any] = {**min(entries, key=lambda each: len(each["tokens"]))}
    llm = engine(options)
    llm.collective_rpc("count_replays")
    records = []
    for stage in ("start", *options["stages"]):
        if stage == "sleep":
            llm.sleep(level=1)
        elif stage == "wake":
            llm.wake_up()
        elif stage != "start":
            llm.collective_rpc(stage)
        right = stage != "sleep" and generate(llm, [entry])[0]["tokens"] == entry["tokens"]
        records.append({"stage": stage, "right": right, "workers": llm.collective_rpc("graph_facts")})
    return records


if __name__ == "__main__":
    print(MARKER + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
