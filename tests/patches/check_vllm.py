"""Checks of what patches/vllm fixes, run against the vLLM on the path, on software NPUs; one for each patch."""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace
from typing import Any

from tests.patches.report import run

modules: dict[str, Any] = sys.modules


def node_variables() -> None:
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars
    from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

    stay = {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "HCCL_IF_IP": "127.0.0.1"}
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


def platform_variables() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.engine.utils import CoreEngineActorManager

    type(current_platform).additional_env_vars = ["HCCL_BUFFSIZE"]  # as a platform's plugin says
    os.environ["HCCL_BUFFSIZE"] = "200"
    manager = CoreEngineActorManager.__new__(CoreEngineActorManager)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    with contextlib.suppress(AttributeError):  # it continues with the engines' places, and there are none
        manager.__init__(config, None, None, False)
    assert manager.env_vars_dict.get("HCCL_BUFFSIZE") == "200"


def metrics_without_serve() -> None:
    modules["ray.serve"] = None
    from vllm.v1.metrics import ray_wrappers

    assert ray_wrappers.ray_metrics is not None


if __name__ == "__main__":
    run(
        {
            "vllm-0001": node_variables,
            "vllm-0002": device_range,
            "vllm-0003": pipeline_communicator,
            "vllm-0006": platform_variables,
            "vllm-0007": metrics_without_serve,
        }
    )
