"""The stream of a communicator, made by CANN and not by torch_npu, whose streams live as long as the process.

An error stops a stream for good, and from then on makes every synchronisation of its device fail. A stream of
its own goes with its communicator, so that a process whose transfer has failed may go on with its other work.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_uint32, c_void_p
from functools import cache
from typing import Any

from vllm_ray_ascend.accelerators import npu_errors
from vllm_ray_ascend.errors import HcclError
from vllm_ray_ascend.transport.hccl.library import recent_error

_SYNC = 1  # ACL_EVENT_SYNC: streams and the host may wait for it
_LATE = (507046, 507047)  # ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT
_RECORDED = 1  # ACL_EVENT_RECORDED_STATUS_COMPLETE
_RUNTIME = 15  # HCCL_E_RUNTIME
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aclrtCreateStream": (POINTER(c_void_p),),
    "aclrtDestroyStreamForce": (c_void_p,),
    "aclrtSynchronizeStreamWithTimeout": (c_void_p, c_int32),
    "aclrtStreamWaitEvent": (c_void_p, c_void_p),
    "aclrtCreateEventExWithFlag": (POINTER(c_void_p), c_uint32),
    "aclrtRecordEvent": (c_void_p, c_void_p),
    "aclrtQueryEventStatus": (c_void_p, POINTER(c_int)),
    "aclrtSynchronizeEventWithTimeout": (c_void_p, c_int32),
    "aclrtDestroyEvent": (c_void_p,),
}


class Mark:
    """A point in a lane's stream. The calling thread has the lane's device set, for each method."""

    def __init__(self, stream: int | c_void_p) -> None:
        handle = c_void_p()
        _call("aclrtCreateEventExWithFlag", byref(handle), _SYNC)
        self._event = handle
        _call("aclrtRecordEvent", self._event, stream)

    def passed(self) -> bool:
        """Whether the stream is past it."""
        found = c_int()
        _call("aclrtQueryEventStatus", self._event, byref(found))
        return found.value == _RECORDED

    def wait(self, limit_s: float) -> bool:
        """The host waits, for ``limit_s`` seconds at most; whether the stream is past it."""
        milliseconds = max(1, int(limit_s * 1000))
        return not _call("aclrtSynchronizeEventWithTimeout", self._event, milliseconds, but=_LATE)

    def before(self, stream: Any) -> None:
        """What one of torch's streams gets from now on comes after it."""
        _call("aclrtStreamWaitEvent", bare(stream), self._event)

    def close(self) -> None:
        """Forget it, once it is past. Who waits for an event of this kind waits for what it was when he was told to."""
        _call("aclrtDestroyEvent", self._event)


class Lane:
    """A stream of the device that the calling thread has set."""

    def __init__(self) -> None:
        handle = c_void_p()
        _call("aclrtCreateStream", byref(handle))
        assert handle.value is not None
        self.stream = handle.value

    def after(self, stream: Any) -> Mark | None:
        """What comes in this stream comes after what one of torch's has, up to the mark, which is to be kept till then.

        None where that one has nothing to do. The mark is CANN's: one of torch's would go through its queue, and so
        through another thread and back.
        """
        if stream.query():
            return None
        mark = Mark(bare(stream))
        _call("aclrtStreamWaitEvent", self.stream, mark._event)
        return mark

    def mark(self) -> Mark:
        """This point in the stream."""
        return Mark(self.stream)

    def error(self, limit_s: float = 0.1) -> str:
        """What CANN says of the error that has stopped the stream, nothing where it goes on."""
        code = _library().aclrtSynchronizeStreamWithTimeout(self.stream, int(limit_s * 1000))
        return recent_error() if code and code not in _LATE else ""

    def close(self, limit_s: float) -> bool:
        """Destroy the stream, once what it has is done or has failed; not where that takes longer."""
        try:
            if _call("aclrtSynchronizeStreamWithTimeout", self.stream, int(limit_s * 1000), but=_LATE):
                return False
        except HcclError:
            pass  # it has stopped, and what waits for its marks has been let go
        _call("aclrtDestroyStreamForce", self.stream)
        return True


def bare(stream: Any) -> c_void_p:
    """The stream of CANN's below one of torch's. torch_npu first hands over to it all that its own queue holds."""
    return c_void_p(stream.npu_stream)


def _call(name: str, *arguments: Any, but: tuple[int, ...] = ()) -> int:
    code = int(getattr(_library(), name)(*arguments))
    if code and code not in but:
        said = recent_error()
        meaning = npu_errors.explain(f"CANN error {code}") or "Look for the first error in the logs of all ranks."
        raise HcclError(f"{name} failed with CANN error {code}{f' ({said})' if said else ''}. {meaning}", _RUNTIME)
    return code


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libascendcl.so")
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library
