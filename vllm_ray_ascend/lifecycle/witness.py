"""Threads by whose end a hub learns of a process's death before the kernel has taken the process apart.

The files of a killed process are closed after its memory was given back, 0.1 s for 1.5 GB, and in turn with those of a
device, whose driver may take longer. But a thread that has a table of files of its own closes it with its own end, and
no child that was forked elsewhere holds a copy of what is in it. There are two, since a process's last thread is the
one that gives the memory back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from vllm_ray_ascend.lifecycle.messages import Address, Witness, line
from vllm_ray_ascend.lifecycle.sockets import connect, keep_alive
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_CLONE_FILES = 0x400
_THREADS = 2
_STANDARD = 3
"""Files 0 to 2, which stay: an error of the thread is written to one of them."""


def start(address: Address, rank: int, silence_s: float) -> None:
    """Have this process's death told to the hub at ``address``, where its lifeline has said hello as ``rank``.

    Where the system refuses a thread its own table (seccomp), only the lifeline tells, later.
    """
    for number in range(_THREADS):
        name = f"RayAscendWitness{number}"
        threading.Thread(target=_run, args=(address, rank, silence_s), daemon=True, name=name).start()


def _run(address: Address, rank: int, silence_s: float) -> None:
    try:
        _have_own_files()
        connection = connect(address)
        keep_alive(connection, silence_s)
        connection.sendall(line(Witness(address.token, rank, os.getpid())))
    except (OSError, AttributeError) as error:
        logger.debug("rank %d's death will be told by its lifeline alone: %s", rank, error)
        return
    number = connection.detach()  # in no other thread is this the number of this file
    with contextlib.suppress(OSError):
        os.read(number, 1)


def _have_own_files() -> None:
    """Give the calling thread a table of files of its own, with nothing of the process's in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_FILES) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_FILES)")
    os.closerange(_STANDARD, 1 + max(map(int, os.listdir("/proc/thread-self/fd"))))
