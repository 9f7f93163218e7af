"""How long vLLM waits for an engine core's process, and what its clients say when that has died."""

from __future__ import annotations

import asyncio
import os
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine import core_client, utils
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_ray_ascend.control.timeouts import engine_exit_s, stop_grace_s
from vllm_ray_ascend.engine.shutdown import end_waits_for_engine_core, extend_shutdown_timeout

pytestmark = pytest.mark.integration


def start_manager(ranks: int, shutdown_timeout: int = 0) -> Any:
    """Create vLLM's manager of no process at all, for an engine core of so many ranks."""
    parallel = SimpleNamespace(world_size=ranks, data_parallel_size=1, assigned_physical_gpu_ids=None)
    config: Any = SimpleNamespace(shutdown_timeout=shutdown_timeout, parallel_config=parallel)
    manager: Any = utils.CoreEngineProcManager
    return manager(0, 0, 0, vllm_config=config, local_client=True, handshake_address="", executor_class=None,
                   log_stats=False)  # fmt: skip


@pytest.mark.skipif(
    not hasattr(utils, "get_engine_process_shutdown_timeout"), reason="this vLLM waits for a fixed time"
)
def test_the_time_of_an_engine_core_follows_the_number_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_STOP_GRACE_S", "5")
    extend_shutdown_timeout(utils)
    seconds = utils.get_engine_process_shutdown_timeout
    assert seconds(0, 0) == engine_exit_s(5, 1) == 17
    start_manager(2048).shutdown(0)
    assert seconds(0, 0) == engine_exit_s(5, 2048) == stop_grace_s(5, 2048) + 12
    start_manager(2)
    assert seconds(0, 0) == engine_exit_s(5, 2048), "of the largest"
    assert (seconds(30, 0), seconds(30, 12), seconds(0, 7)) == (0, 12, 7), "a limit of the user's own stays"


def connect_to_nobody(client: Any, *_: Any, **__: Any) -> None:
    """Take the place of the part of vLLM's client that starts an engine core."""
    client.ctx, client.decoder, client.utility_results = zmq.Context(), None, {}
    client.resources = core_client.BackgroundResources(client.ctx, output_socket=client.ctx.socket(zmq.PULL))
    client.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    client._finalizer = weakref.finalize(client, client.resources)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's client of a process of `LLM`, with its thread and sockets."""
    monkeypatch.setattr(core_client.MPClient, "__init__", connect_to_nobody)
    end_waits_for_engine_core()
    made: Any = core_client.SyncMPClient
    return made(None, None, False)


def test_generate_and_calls_end_once_the_engine_core_has_died(client: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        outputs = pool.submit(client.get_output)
        call: Future[str] = Future()
        done: Future[str] = Future()
        done.set_result("before")
        client.utility_results = {1: call, 2: done}
        client.shutdown()  # as the thread does that watches the engine core's process
        with pytest.raises(EngineDeadError):
            outputs.result(30)
    assert isinstance(call.exception(30), EngineDeadError) and done.result() == "before"


def test_calls_of_a_server_end_too(client: Any) -> None:
    async def wait_for_call() -> None:
        call = client.utility_results[1] = asyncio.get_running_loop().create_future()
        cancelled = client.utility_results[2] = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await asyncio.to_thread(client.shutdown)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(call, 30)

    asyncio.run(wait_for_call())


@pytest.mark.parametrize("says_so", [False, True])
def test_the_files_of_its_sockets_are_gone_before_its_process_is(client: Any, says_so: bool) -> None:
    """Ray ends a replica of Serve in a way by which Python never gets to the end.

    An engine core whose worker has died says so; one that is killed does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        client.resources.input_socket = client.ctx.socket(zmq.ROUTER)
        client.resources.input_socket.bind(f"ipc://{folder}/input")
        client.resources.validate_alive([zmq.Frame(b"a batch"), zmq.Frame(b"of outputs")])
        assert os.listdir(folder) == ["input"]
        if says_so:
            with pytest.raises(EngineDeadError):
                client.resources.validate_alive([zmq.Frame(EngineCoreProc.ENGINE_CORE_DEAD)])
        else:
            client.shutdown()
        assert os.listdir(folder) == []
