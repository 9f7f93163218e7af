"""The C functions of libhccl and libascendcl, for test processes without torch. Device memory is host memory there."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

SUCCESS, PARA, PTR, TIMEOUT, TCP_CONNECT, REMOTE, SUSPENDING, NOT_SUPPORT, NOT_FOUND = 0, 1, 2, 9, 11, 21, 22, 5, 6
INT32, FP16, FP32, INT64, BF16, FP8 = 2, 3, 4, 5, 11, 15
SUM, PROD, MAX, MIN = 0, 1, 2, 3

acl = ctypes.CDLL("libascendcl.so", mode=ctypes.RTLD_GLOBAL)
hccl = ctypes.CDLL("libhccl.so")
acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
hccl.HcclGetErrorString.restype = ctypes.c_char_p

RootInfo = c_char * 4108
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])


class HcclError(Exception):
    """A call that did not return HCCL_SUCCESS."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}: {error_text()}")
        self.code = code


def error_text() -> str:
    """Return the text of aclGetRecentErrMsg."""
    return (acl.aclGetRecentErrMsg() or b"").decode()


def call(name: str, *arguments: Any) -> None:
    """Call an HCCL function. Raises HcclError."""
    code = getattr(hccl, name)(*arguments)
    if code != SUCCESS:
        raise HcclError(code)


def start(device: int = RANK) -> None:
    """Open the device."""
    assert acl.aclInit(None) == 0
    assert acl.aclrtSetDevice(device) == 0, error_text()


def new_stream() -> c_void_p:
    """Return a stream of the device that is set."""
    stream = c_void_p()
    assert acl.aclrtCreateStream(byref(stream)) == 0, error_text()
    return stream


def root_info(name: str = "root", root: int = 0) -> Any:
    """Return the root information that rank `root` makes and passes to the others in a file."""
    path, info = FOLDER / name, RootInfo()
    if root == RANK:
        call("HcclGetRootInfo", byref(info))
        partial = path.with_suffix(".partial")
        partial.write_bytes(bytes(info))
        partial.rename(path)
        return info
    while not path.exists():
        time.sleep(0.005)
    return RootInfo.from_buffer_copy(path.read_bytes())


def init(name: str = "root", size: int = SIZE, rank: int = RANK) -> c_void_p:
    """Return a communicator of all ranks."""
    comm = c_void_p()
    call("HcclCommInitRootInfo", c_uint32(size), byref(root_info(name)), c_uint32(rank), byref(comm))
    return comm


def pointer(array: np.ndarray) -> c_void_p:
    """Return the address of an array's data."""
    return c_void_p(array.ctypes.data)


def all_reduce(comm: c_void_p, stream: c_void_p, array: np.ndarray, kind: int = FP32, op: int = SUM) -> None:
    """Append an all-reduce in place."""
    call("HcclAllReduce", pointer(array), pointer(array), c_uint64(array.size), kind, op, comm, stream)


def send(comm: c_void_p, stream: c_void_p, array: np.ndarray, peer: int) -> None:
    """Append a send of an int32 array."""
    call("HcclSend", pointer(array), c_uint64(array.size), INT32, c_uint32(peer), comm, stream)


def receive(comm: c_void_p, stream: c_void_p, array: np.ndarray, peer: int) -> None:
    """Append a receive of an int32 array."""
    call("HcclRecv", pointer(array), c_uint64(array.size), INT32, c_uint32(peer), comm, stream)


def synchronize(stream: c_void_p) -> None:
    """Wait for the stream, which must not have failed."""
    assert acl.aclrtSynchronizeStream(stream) == 0, error_text()


def broken(stream: c_void_p) -> str:
    """Wait for the stream, which must have failed; returns the text of aclGetRecentErrMsg."""
    assert acl.aclrtSynchronizeStream(stream) != 0, "no error"
    return error_text()


def async_error(comm: c_void_p) -> int:
    """Return what the watchdog of torch_npu sees."""
    error = c_int()
    call("HcclGetCommAsyncError", comm, byref(error))
    return error.value


def mark(name: str) -> None:
    """Report to the other ranks that this one has reached this point."""
    (FOLDER / f"{name}.mark").touch()


def await_mark(name: str) -> None:
    """Wait until a rank has reached that point."""
    while not (FOLDER / f"{name}.mark").exists():
        time.sleep(0.005)


@contextmanager
def refused(code: int, *words: str, or_code: int | None = None) -> Iterator[None]:
    """Check that the block raises HcclError with `code`, or with `or_code`, and a text with `words`."""
    found: HcclError | None = None
    try:
        yield
    except HcclError as error:
        found = error
    assert found is not None, f"no error {code}"
    assert found.code in (code, or_code), found
    assert all(word in str(found) for word in words), found


def wait_until(condition: Callable[[], bool], limit: float = 20) -> None:
    """Check that a condition becomes true within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"descriptors {descriptors()}, {threads()} threads"
        time.sleep(0.005)


def descriptors() -> list[str]:
    """Return what this process has open."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}").split(":")[0])
        except OSError:
            continue  # the listing's own
    return sorted(found)


def threads() -> int:
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))
