"""Installation of this folder's wrappers around vllm-ascend's methods, once its worker's module is loaded."""

from __future__ import annotations

import sys
from types import ModuleType

from vllm_ray_ascend import patches
from vllm_ray_ascend.acl_graphs.capture import with_consensus, with_fallback
from vllm_ray_ascend.acl_graphs.release import with_recapture_on_wake, with_release_on_sleep
from vllm_ray_ascend.acl_graphs.update_guard import with_parameter_update_guard, with_update_guard
from vllm_ray_ascend.compat.import_hook import when_imported

_WORKER = "vllm_ascend.worker.worker"
_RUNNER = "vllm_ascend.worker.model_runner_v1.NPUModelRunner"
_UPDATABLE_GRAPH = "vllm_ascend.compilation.updatable_graph"


def install() -> None:
    """Install the hooks in this process, now or when vllm-ascend's worker is loaded. May be called again.

    Raises UpstreamChangedError where a method is gone, as does the import of the worker's module later.
    """
    when_imported(_WORKER, _wrap_methods)


def _wrap_methods(module: ModuleType) -> None:
    runner, worker = module.NPUModelRunner, module.NPUWorker
    patches.wrap(f"{_RUNNER}.capture_model", with_fallback, runner)
    patches.wrap("vllm.v1.worker.gpu_model_runner.GPUModelRunner._warmup_and_capture", with_consensus, runner)
    patches.wrap(f"{_RUNNER}._update_full_graph_params_if_needed", with_parameter_update_guard, runner)
    patches.wrap(f"{_WORKER}.NPUWorker.sleep", with_release_on_sleep, worker)
    patches.wrap(f"{_WORKER}.NPUWorker.wake_up", with_recapture_on_wake, worker)
    updatable = sys.modules.get(_UPDATABLE_GRAPH)
    if updatable is not None:  # vllm-ascend 0.23 has none
        patches.wrap(f"{_UPDATABLE_GRAPH}.UpdatableGraph.update", with_update_guard, updatable.UpdatableGraph)
