"""Cases that tests.softnpu.test_plugin runs in a fresh process each: a function that prints JSON after a marker.

python -m tests.softnpu.plugin_script process
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

MARKER = "RESULT "
MODEL = Path(__file__).resolve().parents[2] / "demo" / "models" / "zen-dense"
PROMPT = "The Zen of Python, by Tim Peters"


def platform() -> dict[str, Any]:
    """Return vLLM's platform in this process."""
    from vllm.platforms import current_platform

    kind = type(current_platform)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "ours": vars(kind).get("_vllm_ray_ascend"),
        "facts": [kind.ray_device_key, kind.device_control_env_var, kind.ray_noset_device_env_vars],
    }


def actors() -> list[dict[str, Any]]:
    """Return the same in Ray actors that have only the variables which workers get before they import anything."""
    import ray

    from vllm_ray_ascend.environment.table import early_variables

    _local_cluster(npus=1)
    drivers: list[dict[str, str]] = json.loads(sys.argv[2])
    asked = [
        ray.remote(PlatformActor).options(runtime_env={"env_vars": early_variables(driver)}).remote()
        for driver in drivers
    ]
    return ray.get([actor.platform.remote() for actor in asked], timeout=200)  # type: ignore[no-any-return]


class PlatformActor:
    def platform(self) -> dict[str, Any]:
        return platform()


def process() -> dict[str, Any]:
    """Return the platform, and the class that `--distributed-executor-backend ray` means, asked as vLLM asks."""
    from types import SimpleNamespace
    from typing import cast

    from vllm.config import VllmConfig
    from vllm.plugins import load_general_plugins
    from vllm.v1.executor.abstract import Executor

    if "ours-first" in sys.argv:  # as where the class arrives pickled, before plugins are loaded
        import vllm_ray_ascend.executor.executor  # noqa: F401
    load_general_plugins()
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="ray"))
    kind = Executor.get_class(cast(VllmConfig, config))
    return {"platform": platform(), "executor": f"{kind.__module__}.{kind.__qualname__}"}


def config() -> dict[str, Any]:
    """Return the error of an engine's configuration: without Ray, or with the package metadata of a folder."""
    if sys.argv[2] == "without-ray":
        sys.modules["ray"] = None  # type: ignore[assignment]
    else:
        sys.path.insert(0, sys.argv[2])
    from vllm.engine.arg_utils import EngineArgs

    error = ""
    try:
        EngineArgs(model=str(MODEL), distributed_executor_backend="ray", tensor_parallel_size=2).create_engine_config()
    except Exception as caught:  # noqa: BLE001 - the test looks at whatever it is
        error = f"{type(caught).__qualname__}: {caught}"
    return {"error": error}


def growing() -> dict[str, Any]:
    """Add the second NPU to a cluster while the executor's check waits for it."""
    import time
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    import ray
    from ray.cluster_utils import Cluster

    from vllm_ray_ascend.cluster.connect import connect, require_npus

    node = {"num_cpus": 1, "resources": {"NPU": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        connect(SimpleNamespace(ray_runtime_env=None), cluster.address)
        with ThreadPoolExecutor() as threads:
            check = threads.submit(require_npus, 2, {"--tensor-parallel-size": 2}, 120.0)
            time.sleep(2)
            waits = not check.done()
            cluster.add_node(**node)
            check.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {"waits": waits}


def engine() -> dict[str, Any]:
    """Run a healthy engine on one node: executor, workers, their variables, the text."""
    import ray

    _local_cluster(npus=2)
    os.environ.update(HCCL_IF_IP="127.0.0.1", HCCL_CONNECT_TIMEOUT="321", SOFTNPU_STREAMS="77")
    llm = _llm(tensor_parallel_size=2)
    from vllm import SamplingParams

    out = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    running = llm.llm_engine.engine_core.engine_core.model_executor
    return {
        "text": out[0].outputs[0].text,
        "executor": type(running).__qualname__,
        "ranks": [[rank.rank, rank.address, rank.visible_index, rank.physical_id, rank.pid] for rank in running.ranks],
        "workers": llm.collective_rpc(_worker_facts),
        "address": ray.util.get_node_ip_address(),
    }


def imports() -> dict[str, Any]:
    """Import a module as a process of Ray does that is given one of its classes."""
    full_collections = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full_collections.append(phase)

    gc.callbacks.append(count)
    importlib.import_module(sys.argv[2])
    return {"full_collections": len(full_collections), "enabled": gc.isenabled()}


def framework() -> dict[str, Any]:
    """Run an engine after a framework's patches: subclasses of executor and worker, wrapped startup and calls.

    They are made before vLLM loads its plugins. Calls are wrapped once more afterwards, as by a framework that is
    imported late.
    """
    import functools

    import vllm.v1.executor.ray_executor_v2 as upstream
    from vllm import SamplingParams
    from vllm.plugins import load_general_plugins

    calls: list[str] = []
    before: Any = upstream.RayExecutorV2._init_executor

    @functools.wraps(before)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append("wrapper")
        before(self, *args, **kwargs)

    def wrap_calls(executor: Any, mark: str) -> None:
        """Wrap the calls of all workers: note what is called, and mark each answer to `_framework_facts`."""
        original: Any = executor.collective_rpc

        @functools.wraps(original)
        def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            called[mark].add(method if isinstance(method, str) else method.__name__)
            answers = original(self, method, *args, **kwargs)
            return [[mark, answer] for answer in answers] if method is _framework_facts else answers

        executor.collective_rpc = collective_rpc

    parents: Any = upstream
    called: dict[str, set[str]] = {"early": set(), "late": set()}
    wrap_calls(parents.RayExecutorV2, "early")

    class Executor(parents.RayExecutorV2):  # type: ignore[misc]
        def _init_executor(self) -> None:
            calls.append("subclass")
            super()._init_executor()

    class Worker(parents.RayWorkerProc):  # type: ignore[misc]
        def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
            os.environ["FRAMEWORK"] = "ran"
            super().initialize_worker(*args, **kwargs)

    parents.RayWorkerProc = Worker
    parents.RayExecutorV2._init_executor = wrapper
    parents.RayExecutorV2 = Executor
    _local_cluster(npus=2)
    load_general_plugins()
    wrap_calls(parents.RayExecutorV2, "late")
    llm = _llm(tensor_parallel_size=2)
    running = llm.llm_engine.engine_core.engine_core.model_executor
    out = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return {
        "calls": calls,
        "executor": type(running).__qualname__,
        "reported": len(running.ranks),
        "workers": llm.collective_rpc(_framework_facts),
        "called": {mark: sorted(methods) for mark, methods in called.items()},
        "text": out[0].outputs[0].text,
    }


def _framework_facts(_: Any) -> Any:
    return os.environ.get("FRAMEWORK")


def _worker_facts(worker: Any) -> dict[str, Any]:
    import torch

    hccl = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    names = (*hccl, "SOFTNPU_STREAMS", "VLLM_HOST_IP")
    return {
        "worker": type(worker.worker).__qualname__,
        "platform": platform(),
        "pid": os.getpid(),
        "device": torch.npu.current_device(),
        "variables": {name: os.environ.get(name) for name in names},
        "gc": {"enabled": gc.isenabled(), "frozen": gc.get_freeze_count()},
    }


def refused() -> dict[str, Any]:
    """Try an engine that cannot start; return what it leaves. Arguments: NPUs, tensor parallel size, visible list."""
    import ray

    npus, size, visible = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if visible:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = visible
    _local_cluster(npus)
    os.environ.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    error = ""
    try:
        _llm(tensor_parallel_size=size)
    except Exception as caught:  # noqa: BLE001 - the test looks at whatever it is
        error = f"{type(caught).__qualname__}: {caught}"
    _until(lambda: ray.available_resources().get("NPU", 0) == npus)
    return {
        "error": error,
        "free": ray.available_resources().get("NPU", 0),
        "placements": [row["state"] for row in ray.util.placement_group_table().values()],
    }


def _until(condition: Any, limit_s: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def _local_cluster(npus: int) -> None:
    import ray

    ray.init(address="local", num_cpus=4, resources={"NPU": npus}, include_dashboard=False, log_to_driver=False)


def _llm(**sizes: int) -> Any:
    from vllm import LLM

    return LLM(
        model=str(MODEL),
        dtype="float32",
        distributed_executor_backend="ray",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
        disable_log_stats=True,
        seed=0,
        **sizes,
    )


CASES = {
    function.__name__: function for function in (process, actors, config, growing, engine, imports, framework, refused)
}

if __name__ == "__main__":
    print(MARKER + json.dumps(CASES[sys.argv[1]]()), flush=True)
