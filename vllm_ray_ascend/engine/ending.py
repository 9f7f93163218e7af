"""Ends that vLLM leaves to chance: an engine core's, which it kills at once or leaves alone, and its sockets' files."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from importlib import import_module
from types import ModuleType
from typing import Any

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.lifecycle.shared_memory import remove
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_NAME = "get_engine_process_shutdown_timeout"
_IPC_PATH = "get_open_zmq_ipc_path"
_ENGINES_OWN_S = 12.0
"""Seconds beside those that its workers have."""


def grant_time(utils: ModuleType) -> None:
    """Let an engine core's process end by itself, where vLLM would wait for it no time at all.

    vLLM (0.30 on) waits 15 s on ROCm for the same reason, in the function that is replaced here; without it workers
    are never told to stop, and HCCL's connections end with their processes. Older releases wait 5 s.
    """
    if not hasattr(utils, _NAME):
        return
    original = upstream(utils, _NAME)

    def timeout(request_timeout: float | None, process_timeout: float | None) -> float | None:
        seconds: float | None = original(request_timeout, process_timeout)
        return load().stop_grace_s + _ENGINES_OWN_S if request_timeout == 0 and seconds == 0 else seconds

    replace(utils, _NAME, timeout)


def end_with_server() -> None:
    """Have an engine core that is a process of its own end, in order, where the server that started it is gone.

    A server that is killed with SIGKILL tells nobody, and vLLM's engine core then holds its NPUs for good.
    """
    server = multiprocessing.parent_process()
    if server is not None and multiprocessing.current_process().name.startswith("EngineCore"):
        threading.Thread(target=_follow, args=(server,), daemon=True, name="RayAscendServerWatch").start()


def _follow(server: Any) -> None:
    server.join()
    logger.error("The server, process %d, is gone: its engine ends", server.pid)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(load().stop_grace_s + _ENGINES_OWN_S)
    os._exit(1)


def leave_no_sockets(utils: ModuleType) -> None:
    """Remove the files of the sockets between server and engine cores when the process ends that has named them.

    ``utils`` is vllm.v1.engine.utils. The ZeroMQ of pyzmq 27 leaves a socket's file behind however it is closed.
    """
    original = upstream(utils, _IPC_PATH)
    paths: list[str] = []
    owner = os.getpid()

    def ipc_path() -> str:
        address: str = original()
        paths.append(address.removeprefix("ipc://"))
        return address

    def forget() -> None:
        if os.getpid() == owner:  # no forked child, whose end comes before
            remove(paths)

    for module in (utils, import_module("vllm.v1.utils")):
        replace(module, _IPC_PATH, ipc_path)
    atexit.register(forget)
