"""The executor behind `--distributed-executor-backend ray`. Imported late: it needs vLLM and Ray."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS, initialize_ray_cluster

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cluster.connect import connect, require_npus
from vllm_ray_ascend.compat.rebind import with_globals
from vllm_ray_ascend.compat.versions import stack
from vllm_ray_ascend.environment.table import early_variables, of_the_node
from vllm_ray_ascend.executor.ranks import Rank, ready_line, report
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_REPORT_LIMIT_S = 60.0


class RayAscendExecutor(RayExecutorV2):
    """vLLM's RayExecutorV2 on NPUs. Its start is upstream's, with our worker, our checks and our rule for variables."""

    ranks: list[Rank]

    def _init_executor(self) -> None:
        own_placement = self.parallel_config.placement_group is None
        start = with_globals(
            super()._init_executor.__func__,
            RayWorkerProc=RayAscendWorkerProc,
            WORKER_SPECIFIC_ENV_VARS=WORKER_SPECIFIC_ENV_VARS | of_the_node(os.environ),
            initialize_ray_cluster=_initialize_ray_cluster,
        )
        try:
            start(self)
            self.ranks = self.collective_rpc(report, timeout=_REPORT_LIMIT_S)
        except BaseException:
            self._undo_start(own_placement)
            raise
        logger.info("%s", ready_line(__version__, stack(), self.ranks))

    def _build_runtime_env(self) -> dict[str, Any]:
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        for name, value in early_variables().items():
            runtime_env.setdefault("env_vars", {}).setdefault(name, value)
        return runtime_env

    def _undo_start(self, own_placement: bool) -> None:
        """Kill workers of a start that failed, and give their NPUs back where the placement was made for it."""
        import ray

        self.shutdown()
        placement = self.parallel_config.placement_group
        if own_placement and placement is not None and ray.is_initialized():
            ray.util.remove_placement_group(placement)
            self.parallel_config.placement_group = None


def _initialize_ray_cluster(parallel_config: Any, ray_address: str | None = None, **options: Any) -> None:
    """vLLM's, after our checks: what cannot work is refused before anything is placed."""
    connect(parallel_config, ray_address)
    require_npus(parallel_config, load().npu_wait_s)
    initialize_ray_cluster(parallel_config, ray_address, **options)
