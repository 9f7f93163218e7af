"""Threads whose exit shows a control server that their process has died, before the kernel has torn it down.

The kernel closes a killed process's files after it has freed the process's memory, 0.1 s for 1.5 GB, and together with
the files of a device, whose driver may take longer. But a thread with a file table of its own closes that table when
the thread exits, and no child that was forked in another thread holds copies of the files in it. There are two such
threads, since the last thread of a process is the one that frees the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from vllm_ray_ascend.control.protocol import SentinelHello, encode_message
from vllm_ray_ascend.ipc.authentication import connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address, keep_alive
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_CLONE_FILES = 0x400
_SENTINELS = 2
_STANDARD_FILES = 3
"""Files 0 to 2 stay open: an error of the thread is written to one of them."""


def start_sentinels(address: Address, rank: int, silence_s: float) -> None:
    """Connect the exit sentinels of this process to the server at ``address``, where its client is known as ``rank``.

    Where the system refuses a thread a file table of its own (seccomp), the exit is detected by the client's connection
    alone, later.
    """
    for number in range(_SENTINELS):
        name = f"RayAscendExitSentinel{number}"
        threading.Thread(target=_run_sentinel, args=(address, rank, silence_s), daemon=True, name=name).start()


def _run_sentinel(address: Address, rank: int, silence_s: float) -> None:
    try:
        _unshare_file_table()
        connection = connect_authenticated(address)
        keep_alive(connection, silence_s)
        connection.sendall(encode_message(SentinelHello(rank, os.getpid())))
    except (OSError, AttributeError) as error:
        logger.debug("the exit of rank %d will be detected by its control connection alone: %s", rank, error)
        return
    descriptor = connection.detach()  # in no other thread does this number mean this file
    with contextlib.suppress(OSError):
        os.read(descriptor, 1)


def _unshare_file_table() -> None:
    """Give the calling thread a file table of its own, without the files of the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_FILES) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_FILES)")
    os.closerange(_STANDARD_FILES, 1 + max(map(int, os.listdir("/proc/thread-self/fd"))))
