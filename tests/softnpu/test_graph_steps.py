"""Two of vllm-ascend's workers step down together. As a program, this file is one of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from demo.train.recitation import DENSE
from tests.softnpu.ranks import run_ranks, succeeded

SIZES = [1, 2, 4, 8]
BEFORE, OF_A_GRAPH = 34, 3
"""Streams of torch_npu's own; that a graph is captured on, and two for the communicator of tensor parallelism."""
BUDGET = BEFORE + 3 * OF_A_GRAPH + 1


def test_ranks_step_down_together_release_and_capture_anew(tmp_path: Path) -> None:
    """Streams for three graphs; then rank 1 alone fails at its second of those."""
    variables = {
        "SOFTNPU_STREAMS": str(BUDGET),
        "SOFTNPU_FAULTS": "capture:device=1,nth=5",
        "VLLM_RAY_ASCEND_GRAPH_BUDGET": "warn",
        "HCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    log = "\n".join(succeeded(run_ranks("test_graph_steps", "main", 2, tmp_path, variables, limit=400)))
    for rank in range(2):
        start, released, again = json.loads((tmp_path / f"said{rank}").read_text())
        kept = {"sizes": [8], "mode": "FULL_DECODE_ONLY", "streams": BEFORE + OF_A_GRAPH, "works": True}
        assert start == again == kept
        assert released == {**kept, "sizes": [], "streams": BEFORE}
    words = " ".join(log.split())
    for said in (
        f"take about {4 * OF_A_GRAPH} streams (communicators tp in each graph), {BUDGET - BEFORE} are free",
        "with 3 of 4 graphs captured: rank 0, and 1 more rank: the NPU has 1 streams left, and such a graph takes 3",
        "kept 3 of 4: 1, 4, 8",
        "with 1 of 3 graphs captured: rank 1: the capture failed",
        "kept 1 of 4: 8",
    ):
        assert said in words


def facts(worker: Any) -> dict[str, Any]:
    """Sizes with a graph, the mode, what the software NPU counts for this process, and whether its NPU still works."""
    from vllm_ascend.compilation import acl_graph

    from vllm_ray_ascend.accelerators.choose import accelerator
    from vllm_ray_ascend.softnpu.table import holdings

    entries = [entry for wrapper in acl_graph._acl_graph_wrappers for entry in wrapper.concrete_aclgraph_entries]
    return {
        "sizes": sorted(entry.num_tokens for entry in entries),
        "mode": worker.model_runner.compilation_config.cudagraph_mode.name,
        "streams": sum(held.streams for held in holdings() if held.pid == os.getpid()),
        "works": accelerator("npu").works(),
    }


def main() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    from vllm_ray_ascend import graphs
    from vllm_ray_ascend.accelerators.choose import accelerator
    from vllm_ray_ascend.graphs import hooks

    rank, folder, memory = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"]), 32 << 20
    accelerator("npu").watch_captures()
    hooks.install()
    config = EngineArgs(
        model=str(DENSE),
        dtype="float32",
        tensor_parallel_size=2,
        distributed_executor_backend="external_launcher",
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES},
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
    for step in (graphs.release, graphs.recapture):
        step(worker)
        seen.append(facts(worker))
    (folder / f"said{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
