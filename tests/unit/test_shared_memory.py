"""Names in /dev/shm that a process has to remove, as nothing else removes them when their owner is killed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vllm_ray_ascend.ipc.shared_memory import open_channel_semaphores, remove_files

pytestmark = pytest.mark.unit

OPENED = """
import ctypes, sys
from vllm_ray_ascend.ipc.shared_memory import open_channel_semaphores
library = ctypes.CDLL(None)
library.sem_open.restype = ctypes.c_void_p
assert sys.argv[1] not in {name.removeprefix("sem.") for name in open_channel_semaphores()}
assert library.sem_open(f"/{sys.argv[1]}".encode(), 0)
print(f"sem.{sys.argv[1]}" in open_channel_semaphores())
"""


@pytest.fixture
def semaphore() -> Iterator[str]:
    """Create a semaphore named as those of Ray's channels; yield its name."""
    library = ctypes.CDLL(None)
    library.sem_open.restype = ctypes.c_void_p
    name = f"hdr{os.getpid()}-1795296685235406848"
    assert library.sem_open(f"/{name}".encode(), os.O_CREAT | os.O_EXCL, ctypes.c_uint(0o600), ctypes.c_uint(0))
    yield name
    library.sem_unlink(f"/{name}".encode())


def test_semaphores_are_found_by_creators_and_by_openers(semaphore: str) -> None:
    assert f"sem.{semaphore}" in open_channel_semaphores()
    done = subprocess.run([sys.executable, "-c", OPENED, semaphore], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


def test_removed_files_may_be_removed_again(semaphore: str) -> None:
    remove_files([f"sem.{semaphore}"])
    assert f"sem.{semaphore}" not in os.listdir("/dev/shm")
    remove_files([f"sem.{semaphore}"])
