"""Shutdown of an engine core, which vLLM kills immediately or leaves running, removal of its sockets' files, and the
end of what waits for an engine core that is gone."""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import zmq

from vllm_ray_ascend import patches
from vllm_ray_ascend.control.timeouts import engine_exit_s
from vllm_ray_ascend.ipc.shared_memory import remove_files
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_IPC = "ipc://"
_server_sockets: set[str] = set()
"""Files of the sockets by which this process, an engine core's, is connected to its server."""


def extend_shutdown_timeout(utils: ModuleType) -> None:
    """Let an engine core's process shut down by itself, where vLLM would kill it immediately.

    vLLM (0.30 and later) waits 15 s on ROCm for the same reason, in the function that is replaced here: without the
    wait workers never receive the command to stop, and HCCL's connections end with their processes. Older releases
    wait 5 s. It follows from the ranks of the largest engine core that this process has started: the function does
    not receive the engine core that it is asked about.
    """
    if not hasattr(utils, "get_engine_process_shutdown_timeout"):
        return
    ranks = 1

    def with_recorded_ranks(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def recorded_init(*args: Any, **kwargs: Any) -> None:
            nonlocal ranks
            config = inspect.signature(init).bind(*args, **kwargs).arguments["vllm_config"]
            ranks = max(ranks, config.parallel_config.world_size)
            init(*args, **kwargs)

        return recorded_init

    def with_extended_timeout(timeout: Callable[..., float | None]) -> Callable[..., float | None]:
        def extended_timeout(request_timeout: float | None, process_timeout: float | None) -> float | None:
            seconds = timeout(request_timeout, process_timeout)
            return engine_exit_s(load().stop_grace_s, ranks) if request_timeout == 0 and seconds == 0 else seconds

        return extended_timeout

    patches.wrap("vllm.v1.engine.utils.CoreEngineProcManager.__init__", with_recorded_ranks)
    patches.wrap("vllm.v1.engine.utils.get_engine_process_shutdown_timeout", with_extended_timeout)


def exit_with_parent(ranks: int) -> None:
    """Shut down this process gracefully once its parent has died, if it is an engine core with a process of its own.

    ``ranks`` is the number of its workers: the process ends itself where that takes longer than they may take.
    A server that is killed with SIGKILL cannot notify anybody, and vLLM's engine core then holds its NPUs permanently.
    """
    server = multiprocessing.parent_process()
    if server is not None and multiprocessing.current_process().name.startswith("EngineCore"):
        threading.Thread(target=_exit_after, args=(server, ranks), daemon=True, name="RayAscendParentMonitor").start()


def _exit_after(server: Any, ranks: int) -> None:
    server.join()
    logger.error("VRA-308: the server, process %d, has died: its engine shuts down", server.pid)
    remove_files(_server_sockets)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(engine_exit_s(load().stop_grace_s, ranks))
    os._exit(1)


def record_server_sockets() -> None:
    """Have the engine core of this process record its sockets' files, which a server that is killed does not remove."""
    patches.wrap("vllm.v1.engine.core.make_zmq_socket", _recording_file)


def _recording_file(make_socket: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_socket)
    def make_and_record(context: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.startswith(_IPC):
            _server_sockets.add(path.removeprefix(_IPC))
        return make_socket(context, path, *args, **kwargs)

    return make_and_record


def end_waits_for_engine_core() -> None:
    """Let whoever waits for an answer of an engine core get EngineDeadError once vLLM's client has shut down.

    It does so when the engine core's process has died. The client of `LLM` only ends the thread that reads the answers:
    `LLM.generate` hangs. And no client ends calls that wait for a result, such as `sleep` or `collective_rpc`.

    The files of its sockets are removed then, or when an engine core says that it dies, after which vLLM's client does
    not shut down: a replica of Ray Serve never gets to the end of its process.
    """
    patches.wrap("vllm.v1.engine.core_client.MPClient.shutdown", _ending_waits)
    patches.wrap("vllm.v1.engine.core_client.BackgroundResources.validate_alive", _removing_files)


def _ending_waits(shut_down: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shut_down)
    def shut_down_and_end_waits(client: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        files = _bound_files(client.resources.input_socket, client.resources.output_socket)
        try:
            shut_down(client, *args, **kwargs)
        finally:
            remove_files(files)
            outputs = getattr(client, "outputs_queue", None)
            if isinstance(outputs, queue.Queue):  # into asyncio's vLLM puts the error
                outputs.put_nowait(EngineDeadError())
            for result in list(getattr(client, "utility_results", {}).values()):
                _fail(result, EngineDeadError())

    return shut_down_and_end_waits


def _removing_files(validate: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(validate)
    def validate_or_remove_files(resources: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            validate(resources, *args, **kwargs)
        except EngineDeadError:
            remove_files(_bound_files(resources.input_socket, resources.output_socket))
            raise

    return validate_or_remove_files


def _bound_files(*sockets: Any) -> list[str]:
    """Return the files of those of the ZeroMQ ``sockets`` that are open and have one."""
    opened = [socket for socket in sockets if socket is not None and not socket.closed]
    addresses = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in opened]
    return [address.removeprefix(_IPC) for address in addresses if address.startswith(_IPC)]


def _fail(result: Future[Any] | asyncio.Future[Any], error: Exception) -> None:
    def fail() -> None:
        if not result.done():
            result.set_exception(error)

    if isinstance(result, Future):
        fail()
    elif not (loop := result.get_loop()).is_closed():
        loop.call_soon_threadsafe(fail)


def remove_ipc_sockets() -> None:
    """Remove the files of the sockets between server and engine cores when the process exits that has named them.

    The ZeroMQ of pyzmq 27 leaves a socket's file behind however it is closed.
    """
    paths: list[str] = []
    owner = os.getpid()

    def record_path(open_path: Callable[[], str]) -> Callable[[], str]:
        def recorded_ipc_path() -> str:
            address = open_path()
            paths.append(address.removeprefix(_IPC))
            return address

        return recorded_ipc_path

    def remove_socket_files() -> None:
        if os.getpid() == owner:  # not in a forked child, which exits earlier
            remove_files(paths)

    patches.wrap("vllm.v1.engine.utils.get_open_zmq_ipc_path", record_path)
    patches.wrap("vllm.v1.utils.get_open_zmq_ipc_path", record_path)
    patches.wrap("vllm.v1.engine.utils.wait_for_engine_startup", _removing_handshake)
    atexit.register(remove_socket_files)


def _removing_handshake(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Return `wait_for_engine_startup`, after which nobody needs the file of the socket that it has used."""

    @functools.wraps(wait)
    def wait_and_remove(handshake_socket: Any, *args: Any, **kwargs: Any) -> Any:
        started = wait(handshake_socket, *args, **kwargs)
        remove_files(_bound_files(handshake_socket))
        return started

    return wait_and_remove
