"""What is needed of libhccl, by ctypes: every result is looked at, and a bad one raised with its meaning and remedy.

Not PyPI's pyhccl: 0.1.0 is an alpha for Python 3.11 on x86_64 only, hands back results for the caller to look at, and
loads the same C functions. HcclCommInitRootInfoConfig is left out: its structure differs between releases of CANN, and
what it sets can be set by HCCL_BUFFSIZE and HCCL_EXEC_TIMEOUT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from vllm_ray_ascend.accelerators import npu_errors
from vllm_ray_ascend.errors import HcclError

ROOT_INFO_BYTES = 4108
"""Of HcclRootInfo (HCCL_ROOT_INFO_BYTES in hccl/hccl_types.h)."""

_RootInfo = c_char * ROOT_INFO_BYTES


class _Item(Structure):
    """HcclSendRecvItem."""

    _fields_ = (
        ("kind", c_int),
        ("data", c_void_p),
        ("count", c_uint64),
        ("dtype", c_int),
        ("peer", c_uint32),
    )


_BUFFER = (c_void_p, c_uint64, c_int)  # address, elements, HcclDataType
_ON = (c_void_p, c_void_p)  # communicator, stream
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "HcclGetRootInfo": (POINTER(_RootInfo),),
    "HcclCommInitRootInfo": (c_uint32, POINTER(_RootInfo), c_uint32, POINTER(c_void_p)),
    "HcclCommDestroy": (c_void_p,),
    "HcclGetCommAsyncError": (c_void_p, POINTER(c_int)),
    "HcclSend": (*_BUFFER, c_uint32, *_ON),
    "HcclRecv": (*_BUFFER, c_uint32, *_ON),
    "HcclBatchSendRecv": (POINTER(_Item), c_uint32, *_ON),
    "HcclBroadcast": (*_BUFFER, c_uint32, *_ON),
    "HcclAllReduce": (c_void_p, *_BUFFER, c_int, *_ON),
    "HcclReduceScatter": (c_void_p, *_BUFFER, c_int, *_ON),
    "HcclAllGather": (c_void_p, *_BUFFER, *_ON),
}


class Buffer(NamedTuple):
    """Device memory: address, elements, and their type as HCCL numbers it."""

    address: int
    elements: int
    dtype: int


class Part(NamedTuple):
    """One of several sends and receives that begin together."""

    sending: bool
    buffer: Buffer
    peer: int


class Library:
    """libhccl. Communicators and streams are the integers that C has; each method raises HcclError."""

    def __init__(self) -> None:
        self._c = ctypes.CDLL("libhccl.so")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = arguments, c_int
        self._c.HcclGetErrorString.argtypes, self._c.HcclGetErrorString.restype = (c_int,), c_char_p

    def root_info(self) -> bytes:
        """What all ranks of a new communicator need, made by one of them, whose device the calling thread has set."""
        info = _RootInfo()
        self._call("HcclGetRootInfo", byref(info))
        return bytes(info)

    def connect(self, size: int, root: bytes, rank: int) -> int:
        """The communicator, once all ``size`` ranks have come: HCCL_CONNECT_TIMEOUT limits the wait."""
        comm = c_void_p()
        self._call("HcclCommInitRootInfo", size, byref(_RootInfo.from_buffer_copy(root)), rank, byref(comm))
        assert comm.value is not None
        return comm.value

    def destroy(self, comm: int) -> None:
        """End a communicator; what waits in it ends with an error, here and at its peers."""
        self._call("HcclCommDestroy", comm)

    def async_error(self, comm: int) -> int:
        """The code with which an operation of the communicator has failed meanwhile, 0 for none."""
        found = c_int()
        self._call("HcclGetCommAsyncError", comm, byref(found))
        return found.value

    def text(self, code: int) -> str:
        """HCCL's own few words for a code."""
        return (self._c.HcclGetErrorString(code) or b"").decode(errors="replace")

    def send(self, buffer: Buffer, peer: int, comm: int, stream: int) -> None:
        """Append a send to ``stream``."""
        self._call("HcclSend", *buffer, peer, comm, stream)

    def recv(self, buffer: Buffer, peer: int, comm: int, stream: int) -> None:
        """Append a receive to ``stream``."""
        self._call("HcclRecv", *buffer, peer, comm, stream)

    def batch(self, parts: Sequence[Part], comm: int, stream: int) -> None:
        """Append sends and receives that do not wait for each other."""
        items = (_Item * len(parts))(*(_Item(0 if p.sending else 1, *p.buffer, p.peer) for p in parts))
        self._call("HcclBatchSendRecv", items, len(parts), comm, stream)

    def broadcast(self, buffer: Buffer, root: int, comm: int, stream: int) -> None:
        """Append a broadcast in place from rank ``root``."""
        self._call("HcclBroadcast", *buffer, root, comm, stream)

    def all_reduce(self, source: Buffer, target: Buffer, op: int, comm: int, stream: int) -> None:
        """Append an all-reduce; the two may be the same."""
        self._call("HcclAllReduce", source.address, *target, op, comm, stream)

    def reduce_scatter(self, source: Buffer, target: Buffer, op: int, comm: int, stream: int) -> None:
        """Append a reduce-scatter; ``source`` holds ``target.elements`` elements for each rank."""
        self._call("HcclReduceScatter", source.address, *target, op, comm, stream)

    def all_gather(self, source: Buffer, target: Buffer, comm: int, stream: int) -> None:
        """Append an all-gather; ``target`` holds ``source.elements`` elements of each rank."""
        self._call("HcclAllGather", source.address, target.address, source.elements, source.dtype, comm, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._c, name)(*arguments)
        if code:
            raise failure(name, code, recent_error())


@cache
def library() -> Library:
    """The one of this process."""
    return Library()


def failure(what: str, code: int, detail: str = "") -> HcclError:
    """The error of ``what``, with the meaning and the remedy of its code, and ``detail`` as CANN tells it."""
    said = f" ({detail})" if detail else ""
    return HcclError(f"{what} failed{said}. {npu_errors.hccl(code)}", code)


def recent_error() -> str:
    """What CANN says of the last error of the calling thread, on one line; asking forgets it."""
    acl = ctypes.CDLL("libascendcl.so")
    acl.aclGetRecentErrMsg.restype = c_char_p
    return " ".join((acl.aclGetRecentErrMsg() or b"").decode(errors="replace").split()).rstrip(". ")
