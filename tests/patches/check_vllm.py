"""Checks of what patches/vllm fixes, run against the vLLM on the path, on software NPUs; one for each patch."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator
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


def error_before_the_first_token() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    completion = CompletionRequest(model="m", prompt="p", max_tokens=1, stream=True)
    chat = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "p"}], stream=True)
    for serving_class, name, request in (
        (OpenAIServingCompletion, "completion", completion),
        (OpenAIServingChat, "chat_completion", chat),
    ):
        chunks = asyncio.run(stream_of(serving_class, name, request))
        assert any('"error"' in chunk for chunk in chunks), f"no error in {chunks}"


async def stream_of(serving_class: Any, name: str, request: Any) -> list[str]:
    """Return what the API server streams of a request that has failed before its first token."""
    without_options = type("Serving", (serving_class,), {"__init__": lambda _: None, "__getattr__": lambda *_: None})
    stream = getattr(without_options(), f"{name}_stream_generator")
    given = {
        "request": request,
        "request_id": "r",
        "created_time": 0,
        "model_name": "m",
        "num_prompts": 1,
    }
    given |= {"engine_inputs": [], "engine_prompts": [], "conversation": [], "tokenizer": None}
    given["result_generator"] = failed(is_indexed=name == "completion")
    given["request_metadata"] = SimpleNamespace(final_usage_info=None)
    taken = inspect.signature(stream).parameters
    return [chunk async for chunk in stream(**{key: value for key, value in given.items() if key in taken})]


async def failed(is_indexed: bool) -> AsyncIterator[Any]:
    from vllm.outputs import CompletionOutput, RequestOutput

    ended = CompletionOutput(0, "", [], None, None, finish_reason="error")
    output = RequestOutput("r", "p", [1], None, [ended], finished=True)
    yield (0, output) if is_indexed else output


def wait_for_a_dead_engine_core() -> None:
    import zmq
    from vllm.v1.engine import core_client
    from vllm.v1.engine.exceptions import EngineDeadError

    def connect(client: Any, *_: Any, **__: Any) -> None:
        client.ctx, client.decoder, client.utility_results = zmq.Context(), None, {}
        client.resources = core_client.BackgroundResources(client.ctx, output_socket=client.ctx.socket(zmq.PULL))
        client.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    core_client.MPClient.__init__ = connect
    client = core_client.SyncMPClient(None, None, False)
    answers: list[Exception] = []

    def wait() -> None:
        try:
            client.get_output()
        except EngineDeadError as error:
            answers.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    client.resources()  # as the thread does that watches the engine core's process
    waiting.join(10)
    assert answers, "still waits for an engine core that has died"


if __name__ == "__main__":
    run(
        {
            "vllm-0001": node_variables,
            "vllm-0002": device_range,
            "vllm-0003": pipeline_communicator,
            "vllm-0006": platform_variables,
            "vllm-0007": metrics_without_serve,
            "vllm-0010": error_before_the_first_token,
            "vllm-0011": wait_for_a_dead_engine_core,
        }
    )
