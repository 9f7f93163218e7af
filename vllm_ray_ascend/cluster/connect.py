"""Join the Ray cluster and check it, before anything is placed on it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from vllm_ray_ascend.cluster.resources import check_npus, live_nodes, total_npus
from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.visible import VARIABLE
from vllm_ray_ascend.log import get_logger

_POLL_S = 1.0

logger = get_logger(__name__)


def connect(parallel_config: Any, address: str | None = None) -> None:
    """Join the cluster at ``address`` as vLLM's initialize_ray_cluster does; nothing where this process is a member.

    Raises RayVersionError where Ray is missing or too old.
    """
    require_ray(installed("ray"))
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, runtime_env=parallel_config.ray_runtime_env)


def require_npus(parallel_config: Any, wait_s: float) -> None:
    """Check that the joined cluster declares the NPUs that the engine needs, waiting up to ``wait_s`` seconds for them.

    vLLM itself would wait half an hour for a placement group that cannot be. Where one is given, vLLM checks that one.
    Raises ClusterResourceError.
    """
    import ray

    if parallel_config.placement_group is not None or ray.util.get_current_placement_group() is not None:
        return
    needed: int = parallel_config.world_size
    deadline = time.monotonic() + wait_s
    nodes = live_nodes(ray.nodes())
    while total_npus(nodes) < needed and (left := deadline - time.monotonic()) > 0:
        logger.info("waiting for NPUs: %d needed, %g there, %.0f s left", needed, total_npus(nodes), left)
        time.sleep(_POLL_S)
        nodes = live_nodes(ray.nodes())
    check_npus(nodes, needed, _sizes(parallel_config), os.environ.get(VARIABLE))


def _sizes(parallel_config: Any) -> Mapping[str, int]:
    sizes = {
        "--tensor-parallel-size": parallel_config.tensor_parallel_size,
        "--pipeline-parallel-size": parallel_config.pipeline_parallel_size,
        "--prefill-context-parallel-size": getattr(parallel_config, "prefill_context_parallel_size", 1),
    }
    return {option: size for option, size in sizes.items() if size > 1} or {"--tensor-parallel-size": 1}
