"""Names in /dev/shm that a process has to remove, since nobody else does when it is killed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vllm_ray_ascend.lifecycle.shared_memory import channels, remove

pytestmark = pytest.mark.unit

OPENED = """
import ctypes, sys
from vllm_ray_ascend.lifecycle.shared_memory import channels
library = ctypes.CDLL(None)
library.sem_open.restype = ctypes.c_void_p
assert sys.argv[1] not in {name.removeprefix("sem.") for name in channels()}
assert library.sem_open(f"/{sys.argv[1]}".encode(), 0)
print(f"sem.{sys.argv[1]}" in channels())
"""


@pytest.fixture
def made() -> Iterator[str]:
    """A semaphore as Ray names those of its channels, made by this process."""
    library = ctypes.CDLL(None)
    library.sem_open.restype = ctypes.c_void_p
    name = f"hdr{os.getpid()}-1795296685235406848"
    assert library.sem_open(f"/{name}".encode(), os.O_CREAT | os.O_EXCL, ctypes.c_uint(0o600), ctypes.c_uint(0))
    yield name
    library.sem_unlink(f"/{name}".encode())


def test_semaphores_are_known_to_who_made_them_and_to_who_opened_them(made: str) -> None:
    assert f"sem.{made}" in channels()
    done = subprocess.run([sys.executable, "-c", OPENED, made], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


def test_what_is_removed_has_no_name_and_may_be_removed_again(made: str) -> None:
    remove([f"sem.{made}"])
    assert f"sem.{made}" not in os.listdir("/dev/shm")
    remove([f"sem.{made}"])
