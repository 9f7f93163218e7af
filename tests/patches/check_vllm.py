"""What patches/vllm mends, asked of the vLLM on the path, on software NPUs; one check a patch."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.patches.report import run

MASTER, OTHER = "127.0.0.1", "127.0.0.2"
modules: dict[str, Any] = sys.modules


def node_variables() -> None:
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars
    from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

    stay = {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "ZE_AFFINITY_MASK": "0", "HCCL_IF_IP": MASTER}
    os.environ.update(stay, HCCL_BUFFSIZE="200")
    copied = get_driver_env_vars(worker_specific_vars=WORKER_SPECIFIC_ENV_VARS)
    assert not set(stay) & set(copied) and "HCCL_BUFFSIZE" in copied, sorted(set(stay) & set(copied))


def device_range() -> None:
    from vllm.config import ParallelConfig
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCoreActorMixin

    os.environ[current_platform.device_control_env_var] = "0,1"
    config = SimpleNamespace(parallel_config=ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="ray"))
    actor = EngineCoreActorMixin.__new__(EngineCoreActorMixin)
    actor._set_visible_devices(config, local_dp_rank=1)
    assert config.parallel_config.assigned_physical_gpu_ids is None


def pipeline_communicator() -> None:
    from ray.experimental.channel.torch_tensor_type import TorchTensorType
    from vllm.distributed.device_communicators.ray_communicator import RayPPCommunicator

    communicator = RayPPCommunicator(2, None, None, [], None)
    assert TorchTensorType(transport=communicator).requires_accelerator()
    with communicator.recv_stream, communicator.send_stream:
        pass


def scale_up() -> None:
    from vllm.v1.engine.utils import CoreEngineActorManager

    nodes = [SimpleNamespace(node_ip=node["NodeManagerAddress"], node_id=node["NodeID"]) for node in ray.nodes()]
    # The state API asks Ray's dashboard, which is an extra of Ray's; its control store says the same.
    modules["ray.util.state"] = SimpleNamespace(list_nodes=lambda: nodes)
    old = SimpleNamespace(data_parallel_size=1, data_parallel_master_ip=MASTER, world_size=1)
    groups, _ = CoreEngineActorManager.add_dp_placement_groups(SimpleNamespace(parallel_config=old), 2)
    (group,) = groups
    assert f"node:{OTHER}" in group.bundle_specs[0], group.bundle_specs


def end_of_workers() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerHandle, RayWorkerProc

    parent: Any = RayWorkerProc

    class Worker(parent):  # type: ignore[misc]
        """vLLM's worker without a model: its loop and its end are upstream's."""

        def __init__(self, handle: Any, ended: str) -> None:
            self.ended = Path(ended)
            self.rank = 0
            self.worker = SimpleNamespace()
            self.rpc_broadcast_mq = MessageQueue.create_from_handle(handle, 0)
            self.worker_response_mq = SimpleNamespace(wait_until_ready=lambda: None)

        def shutdown(self) -> None:
            self.ended.write_text("in order")

    with tempfile.TemporaryDirectory() as folder:
        ended = Path(folder) / "ended"
        executor = RayExecutorV2.__new__(RayExecutorV2)
        executor.is_failed, executor.shutting_down, executor.shutdown_lock = False, False, contextlib.nullcontext()
        executor.rpc_broadcast_mq, executor.response_mqs = MessageQueue(1, 1), []
        actor = ray.remote(Worker).options(num_cpus=0).remote(executor.rpc_broadcast_mq.export_handle(), str(ended))
        handle = RayWorkerHandle(actor=actor, rank=0, local_rank=0, node_id="")
        handle.run()
        executor.ray_worker_handles = [handle]
        executor.rpc_broadcast_mq.wait_until_ready()
        executor.shutdown()
        assert ended.exists(), "the worker was killed in its loop"


def platform_variables() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.engine.utils import CoreEngineActorManager

    type(current_platform).additional_env_vars = ["HCCL_BUFFSIZE"]  # as a platform's plugin says
    os.environ["HCCL_BUFFSIZE"] = "200"
    manager = CoreEngineActorManager.__new__(CoreEngineActorManager)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    with contextlib.suppress(AttributeError):  # it goes on to the engines' places, and there are none
        manager.__init__(config, None, None, False)
    assert manager.env_vars_dict.get("HCCL_BUFFSIZE") == "200"


def metrics_without_serve() -> None:
    modules["ray.serve"] = None
    from vllm.v1.metrics import ray_wrappers

    assert ray_wrappers.ray_metrics is not None


def spawn() -> None:
    from vllm.utils.system_utils import get_mp_context

    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    assert get_mp_context().get_start_method() == "spawn"


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Two nodes of Ray, of which the second has an NPU, joined."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**small, "node_ip_address": MASTER})
    try:
        made.add_node(**small, resources={"NPU": 1}, node_ip_address=OTHER)
        ray.init(made.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        made.shutdown()


if __name__ == "__main__":
    with cluster():
        run(
            {
                "vllm-0001": node_variables,
                "vllm-0002": device_range,
                "vllm-0003": pipeline_communicator,
                "vllm-0004": scale_up,
                "vllm-0005": end_of_workers,
                "vllm-0006": platform_variables,
                "vllm-0007": metrics_without_serve,
                "vllm-0008": spawn,
            }
        )
