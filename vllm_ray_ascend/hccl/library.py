"""The functions of libhccl that are needed, by ctypes: each result is checked, and raised with its meaning and remedy.

Not PyPI's pyhccl: 0.1.0 is an alpha for Python 3.11 on x86_64 only, returns results for the caller to check, and
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
"""Size of HcclRootInfo (HCCL_ROOT_INFO_BYTES in hccl/hccl_types.h)."""

HCCL_E_TCP_CONNECT = 11
HCCL_E_RUNTIME = 15
HCCL_E_AGAIN = 20
"""HcclCommDestroy: the communicator is in use, try again."""
HCCL_E_REMOTE = 21

_RootInfo = c_char * ROOT_INFO_BYTES


class _SendRecvItem(Structure):
    """HcclSendRecvItem."""

    _fields_ = (
        ("kind", c_int),
        ("data", c_void_p),
        ("count", c_uint64),
        ("dtype", c_int),
        ("peer", c_uint32),
    )


_SEND, _RECEIVE = 0, 1  # HcclSendRecvType
_BUFFER = (c_void_p, c_uint64, c_int)  # address, elements, HcclDataType
_TARGET = (c_void_p, c_void_p)  # communicator, stream
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "HcclGetRootInfo": (POINTER(_RootInfo),),
    "HcclCommInitRootInfo": (c_uint32, POINTER(_RootInfo), c_uint32, POINTER(c_void_p)),
    "HcclCommDestroy": (c_void_p,),
    "HcclGetCommAsyncError": (c_void_p, POINTER(c_int)),
    "HcclSend": (*_BUFFER, c_uint32, *_TARGET),
    "HcclRecv": (*_BUFFER, c_uint32, *_TARGET),
    "HcclBatchSendRecv": (POINTER(_SendRecvItem), c_uint32, *_TARGET),
    "HcclBroadcast": (*_BUFFER, c_uint32, *_TARGET),
    "HcclAllReduce": (c_void_p, *_BUFFER, c_int, *_TARGET),
    "HcclReduceScatter": (c_void_p, *_BUFFER, c_int, *_TARGET),
    "HcclAllGather": (c_void_p, *_BUFFER, *_TARGET),
}


class Buffer(NamedTuple):
    """Device memory: address, number of elements, and their HcclDataType."""

    address: int
    elements: int
    dtype: int


class BatchItem(NamedTuple):
    """One of several sends and receives that start together."""

    sending: bool
    buffer: Buffer
    peer: int


class Library:
    """libhccl. Communicators and streams are C's handles as integers; each method raises HcclError."""

    def __init__(self) -> None:
        self._c = ctypes.CDLL("libhccl.so")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = arguments, c_int

    def create_root_info(self) -> bytes:
        """Return what all ranks of a new communicator need, created on the device of the calling thread by one rank."""
        info = _RootInfo()
        self._call_hccl("HcclGetRootInfo", byref(info))
        return bytes(info)

    def init_communicator(self, size: int, root_info: bytes, rank: int) -> int:
        """Return the communicator, once all ``size`` ranks have connected: HCCL_CONNECT_TIMEOUT limits the wait."""
        comm, info = c_void_p(), _RootInfo.from_buffer_copy(root_info[:ROOT_INFO_BYTES])
        self._call_hccl("HcclCommInitRootInfo", size, byref(info), rank, byref(comm))
        assert comm.value is not None
        return comm.value

    def destroy_communicator(self, comm: int) -> None:
        """Destroy a communicator; operations that wait in it end with an error, here and at its peers.

        Raises HcclError with HCCL_E_AGAIN while a call of another thread uses it, unless that hangs in link set-up.
        """
        self._call_hccl("HcclCommDestroy", comm)

    def get_async_error(self, comm: int) -> int:
        """Return 21 where RDMA, which is between nodes, has failed; 0 else."""
        code = c_int()
        self._call_hccl("HcclGetCommAsyncError", comm, byref(code))
        return code.value

    def send(self, buffer: Buffer, peer: int, comm: int, stream: int) -> None:
        """Append a send to ``stream``."""
        self._call_hccl("HcclSend", *buffer, peer, comm, stream)

    def recv(self, buffer: Buffer, peer: int, comm: int, stream: int) -> None:
        """Append a receive to ``stream``."""
        self._call_hccl("HcclRecv", *buffer, peer, comm, stream)

    def batch_send_recv(self, items: Sequence[BatchItem], comm: int, stream: int) -> None:
        """Append sends and receives that do not wait for each other to ``stream``."""
        array = (_SendRecvItem * len(items))(
            *(_SendRecvItem(_SEND if item.sending else _RECEIVE, *item.buffer, item.peer) for item in items)
        )
        self._call_hccl("HcclBatchSendRecv", array, len(items), comm, stream)

    def broadcast(self, buffer: Buffer, root: int, comm: int, stream: int) -> None:
        """Append a broadcast in place from rank ``root`` to ``stream``."""
        self._call_hccl("HcclBroadcast", *buffer, root, comm, stream)

    def all_reduce(self, source: Buffer, target: Buffer, op: int, comm: int, stream: int) -> None:
        """Append an all-reduce to ``stream``; source and target may be the same."""
        self._call_hccl("HcclAllReduce", source.address, *target, op, comm, stream)

    def reduce_scatter(self, source: Buffer, target: Buffer, op: int, comm: int, stream: int) -> None:
        """Append a reduce-scatter to ``stream``; ``source`` holds ``target.elements`` elements for each rank."""
        self._call_hccl("HcclReduceScatter", source.address, *target, op, comm, stream)

    def all_gather(self, source: Buffer, target: Buffer, comm: int, stream: int) -> None:
        """Append an all-gather to ``stream``; ``target`` holds ``source.elements`` elements of each rank."""
        self._call_hccl("HcclAllGather", source.address, target.address, source.elements, source.dtype, comm, stream)

    def _call_hccl(self, name: str, *arguments: Any) -> None:
        code = getattr(self._c, name)(*arguments)
        if code:
            raise hccl_error(name, code, recent_error_message())


@cache
def load_library() -> Library:
    """Return libhccl, loaded once in a process."""
    return Library()


def hccl_error(what: str, code: int, detail: str = "") -> HcclError:
    """Return the error of ``what``, with the meaning and the remedy of its code, and with CANN's own ``detail``."""
    reason = f" ({detail})" if detail else ""
    return HcclError("VRA-503", f"{what} failed{reason}. {npu_errors.explain_hccl_code(code)}", code)


def recent_error_message() -> str:
    """Return CANN's message of the calling thread's last error, on one line; CANN clears it when it is read."""
    acl = ctypes.CDLL("libascendcl.so")
    acl.aclGetRecentErrMsg.restype = c_char_p
    return " ".join((acl.aclGetRecentErrMsg() or b"").decode(errors="replace").split()).rstrip(". ")
