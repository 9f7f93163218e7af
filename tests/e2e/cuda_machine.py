"""Run by tests.e2e.test_cuda_path in a new process that simulates a CUDA machine, or a CPU machine.

vLLM's own CudaPlatform is the platform and vllm-ascend is not there. torch and vLLM are CPU builds, so an empty module
stands in for the library that the platform's module imports, and torchvision, which here has no operators, is hidden.

python -m tests.e2e.cuda_machine (cuda|cpu) CASE
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, cast

MARKER = "RESULT "


def simulate_machine(machine: str) -> None:
    """Set vLLM's platform, before anything else of vLLM is imported."""
    for name in ("vllm_ascend", "torch_npu", "torchvision"):
        sys.modules[name] = None  # type: ignore[assignment]
    import vllm.platforms

    if machine == "cuda":
        sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
        from vllm.platforms.cuda import CudaPlatform as Platform
    else:
        from vllm.platforms.cpu import CpuPlatform as Platform
    vllm.platforms._current_platform = Platform()


def simulate_cuda() -> None:
    """Do the same in Ray's workers, as their setup hook."""
    simulate_machine("cuda")


def choice() -> dict[str, Any]:
    """Return the classes that vLLM gets for its names, and whether they were replaced when plugins were loaded."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    early = "vllm.v1.executor.ray_executor_v2" in sys.modules
    from vllm.config import VllmConfig
    from vllm.v1.engine import core, utils
    from vllm.v1.executor.abstract import Executor

    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="ray"))
    kind: Any = Executor.get_class(cast(VllmConfig, config))
    classes = (kind, utils.CoreEngineActorManager, core.EngineCoreActor)
    return {
        "classes": [each.__qualname__ for each in classes],
        "early": early,
        "actor": kind._get_actor_resource_kwargs(),
    }


def config(world_size: int) -> Any:
    """Return the parts of vLLM's config that placement reads, for one engine."""
    parallel = SimpleNamespace(
        world_size=world_size,
        tensor_parallel_size=world_size,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        data_parallel_index=0,
        data_parallel_backend="mp",
        placement_group=None,
        ray_runtime_env=None,
        assigned_physical_gpu_ids=None,
    )
    return SimpleNamespace(parallel_config=parallel, instance_id="cuda")


def placement() -> dict[str, Any]:
    """Place an engine on a Ray cluster with two declared GPUs; return its workers' GPUs, and errors."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from vllm_ray_ascend.cluster.placement_groups import free_npus_per_node
    from vllm_ray_ascend.devices.kind import GPU
    from vllm_ray_ascend.executor.placement_group import create_placement_group
    from vllm_ray_ascend.executor.worker import RayAscendWorkerProc

    environment = {"worker_process_setup_hook": simulate_cuda}
    ray.init(
        address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment
    )
    noset = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "VLLM_RAY_ASCEND": "1"}}
    group = create_placement_group(config(2))
    workers = [
        ray.remote(RayAscendWorkerProc)
        .options(
            num_cpus=0,
            num_gpus=1,
            runtime_env=noset,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        )
        .remote(vllm_config=config(2), rank=rank, input_shm_handle=None, is_driver_worker=not rank, is_driver_node=True)
        for rank in range(2)
    ]
    answers = ray.get([worker.get_node_and_physical_gpu_ids.remote() for worker in workers], timeout=200)
    held = [(node.free, node.total) for node in free_npus_per_node(GPU)]
    errors = []
    for world_size in (1, 3):
        try:
            create_placement_group(config(world_size))
        except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
            errors.append(f"{type(error).__qualname__}: {error}")
    return {
        "bundles": group.bundle_specs,
        "assigned": sorted(ids for _, ids in answers),
        "held": held,
        "errors": errors,
    }


def refused() -> dict[str, Any]:
    """Return the error of VLLM_RAY_ASCEND=1 on an unsupported machine."""
    try:
        return choice()
    except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
        return {"error": f"{type(error).__qualname__}: {error}"}


CASES = {function.__name__: function for function in (choice, placement, refused)}

if __name__ == "__main__":
    simulate_machine(sys.argv[1])
    print(MARKER + json.dumps(CASES[sys.argv[2]]()), flush=True)
