"""Two of vllm-ascend's workers fall back to fewer graphs together. As a program, this file is one of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo.train.recitation import DENSE
from tests.softnpu.ranks import run_ranks, succeeded

SIZES = [1, 2, 4, 8]
BEFORE, PER_GRAPH = 34, 3
"""Streams of torch_npu's own; those of a graph: the one it is captured on, two for the communicator of tensor
parallelism."""
PIECES = 5
"""Graphs of a batch in mode PIECEWISE: a layer each, and one more."""


class Case(NamedTuple):
    """A configuration, what there is for its graphs, what is left after two steps down, and what they say."""

    config: dict[str, Any]
    streams: int
    fault: str
    kept: dict[str, Any]
    messages: list[str]


CASES = {
    # Streams for three graphs; then rank 1 alone fails at its second of those.
    "decode": Case(
        config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        streams=3 * PER_GRAPH + 1,
        fault="nth=5",
        kept={"mode": "FULL_DECODE_ONLY", "graphs": {"FULL": [8]}, "streams": PER_GRAPH},
        messages=[
            "with 3 of 4 graphs captured: rank 0, and 1 more rank: the NPU has 1 streams left, and such a graph",
            "kept 3 of 4: 1, 4, 8",
            "with 1 of 3 graphs captured: rank 1: the capture failed",
            "kept 1 of 4: 8",
        ],
    ),
    # vllm-ascend's default. Streams for the pieces of two sizes; then rank 1 alone fails at the first piece.
    "default": Case(
        config={},
        streams=2 * PIECES * PER_GRAPH + 1,
        fault=f"nth={2 * PIECES + 1}",
        kept={"mode": "FULL_DECODE_ONLY", "graphs": {"FULL": SIZES}, "streams": len(SIZES) * PER_GRAPH},
        messages=[
            "size 2 in mode FULL_AND_PIECEWISE failed with 2 of 8 graphs captured",
            f"the NPU has 1 streams left, and such a graph takes {PIECES * PER_GRAPH}",
            "kept 1 of 4: 8",
            "with 0 of 2 graphs captured: rank 1: the capture failed",
            "mode FULL_DECODE_ONLY, graphs of decode batches only, sizes 1, 2, 4, 8",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_fall_back_together_release_and_capture_again(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    variables = {
        "SOFTNPU_STREAMS": str(BEFORE + case.streams),
        "SOFTNPU_FAULTS": f"capture:device=1,{case.fault}",
        "HCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    log = "\n".join(succeeded(run_ranks("test_graph_steps", name, 2, tmp_path, variables, limit=400)))
    for rank in range(2):
        start, released, again = json.loads((tmp_path / f"facts{rank}").read_text())
        kept = {**case.kept, "usable": True, "communicators": 1, "estimate": PER_GRAPH}
        assert start == again == {**kept, "streams": BEFORE + case.kept["streams"]}
        assert released == {**kept, "graphs": {}, "streams": BEFORE}
    words = " ".join(log.split())
    for expected in case.messages:
        assert expected in words


def facts(worker: Any) -> dict[str, Any]:
    """Return what a worker has captured, the software NPU's count for this process, and the estimate for one graph."""
    from softnpu.node_table import read_node_table
    from vllm_ascend.compilation import acl_graph

    from vllm_ray_ascend.accelerators.choose import get_accelerator
    from vllm_ray_ascend.acl_graphs.capture import count_graph_communicators, estimate_streams

    graphs: dict[str, set[int]] = {}
    for wrapper in acl_graph._acl_graph_wrappers:
        for entry in wrapper.concrete_aclgraph_entries:
            graphs.setdefault(wrapper.runtime_mode.name, set()).add(entry.num_tokens)
    return {
        "graphs": {mode: sorted(sizes) for mode, sizes in graphs.items()},
        "mode": worker.model_runner.compilation_config.cudagraph_mode.name,
        "streams": sum(held.streams for held in read_node_table() if held.pid == os.getpid()),
        "usable": get_accelerator("npu").is_device_usable(),
        "communicators": count_graph_communicators(),
        "estimate": estimate_streams("FULL", 0, count_graph_communicators()),
    }


def main(graphs: dict[str, Any]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    from vllm_ray_ascend import acl_graphs
    from vllm_ray_ascend.accelerators.choose import get_accelerator
    from vllm_ray_ascend.acl_graphs import hooks

    rank, folder, memory = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"]), 32 << 20
    get_accelerator("npu").watch_captures()
    hooks.install()
    config = EngineArgs(
        model=str(DENSE),
        dtype="float32",
        tensor_parallel_size=2,
        distributed_executor_backend="external_launcher",
        compilation_config={**graphs, "cudagraph_capture_sizes": SIZES},
        max_model_len=512,
        max_num_seqs=max(SIZES),
        kv_cache_memory_bytes=memory,
        additional_config={"weight_nz_mode": 0},
        seed=0,
    ).create_engine_config()
    with set_current_vllm_config(config):
        from vllm_ascend.worker.worker import NPUWorker

        worker = NPUWorker(config, rank, rank, f"file://{folder}/store", rank == 0)
        worker.init_device()
        worker.load_model()
        worker.determine_available_memory()  # its run makes the communicators that graphs use
        if hasattr(worker, "get_supported_kv_cache_layouts"):  # since vLLM 0.30: an engine has the ranks agree
            config.cache_config.kv_cache_layout = worker.get_supported_kv_cache_layouts()[0]
        (cache,) = get_kv_cache_configs(config, [worker.get_kv_cache_spec()], [memory])
        worker.initialize_from_config(cache)
        worker.compile_or_warm_up_model()
    seen = [facts(worker)]
    for step in (acl_graphs.release, acl_graphs.recapture):
        step(worker)
        seen.append(facts(worker))
    (folder / f"facts{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(CASES[sys.argv[1]].config)
