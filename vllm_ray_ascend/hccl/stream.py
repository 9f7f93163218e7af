"""Streams and events of CANN itself, for communicators. torch_npu's streams live as long as the process.

A communicator's own stream is destroyed with it. An error on the device stops all streams of a process
(device_error.py).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int32, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from vllm_ray_ascend.accelerators import npu_errors
from vllm_ray_ascend.errors import HcclError
from vllm_ray_ascend.hccl.library import HCCL_E_RUNTIME, recent_error_message

_EVENT_SYNC = 1  # ACL_EVENT_SYNC: streams and the host may wait for it
_TIMEOUTS = (507046, 507047)  # ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT
_STOP_ON_FAILURE = 1  # ACL_STOP_ON_FAILURE: what torch_npu sets for its own streams
_COMPLETE = 1  # ACL_EVENT_RECORDED_STATUS_COMPLETE
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aclrtCreateStream": (POINTER(c_void_p),),
    "aclrtSetStreamFailureMode": (c_void_p, c_uint64),
    "aclrtSetOpWaitTimeout": (c_uint32,),
    "aclrtDestroyStreamForce": (c_void_p,),
    "aclrtSynchronizeStreamWithTimeout": (c_void_p, c_int32),
    "aclrtStreamWaitEvent": (c_void_p, c_void_p),
    "aclrtCreateEventExWithFlag": (POINTER(c_void_p), c_uint32),
    "aclrtRecordEvent": (c_void_p, c_void_p),
    "aclrtQueryEventStatus": (c_void_p, POINTER(c_int)),
    "aclrtSynchronizeEventWithTimeout": (c_void_p, c_int32),
    "aclrtDestroyEvent": (c_void_p,),
}


class AclEvent:
    """An event recorded in a stream. The calling thread has the stream's device set, for each method."""

    def __init__(self, stream: int | c_void_p) -> None:
        handle = c_void_p()
        _call_acl("aclrtCreateEventExWithFlag", byref(handle), _EVENT_SYNC)
        self.handle = handle
        try:
            _call_acl("aclrtRecordEvent", self.handle, stream)
        except HcclError:
            self.destroy()
            raise

    def is_complete(self) -> bool:
        """Return whether the stream has reached the event."""
        status = c_int()
        _call_acl("aclrtQueryEventStatus", self.handle, byref(status))
        return status.value == _COMPLETE

    def synchronize(self, limit_s: float) -> bool:
        """Block the host for ``limit_s`` seconds at most; return whether the stream has reached the event."""
        milliseconds = max(1, int(limit_s * 1000))
        return not _call_acl("aclrtSynchronizeEventWithTimeout", self.handle, milliseconds, allowed=_TIMEOUTS)

    def block_stream(self, stream: Any) -> None:
        """Have the later work of ``stream``, one of torch's, wait for the event."""
        _call_acl("aclrtStreamWaitEvent", acl_handle(stream), self.handle)

    def destroy(self) -> None:
        """Destroy the event, once it is complete. A stream that was made to wait for it earlier is not affected."""
        _call_acl("aclrtDestroyEvent", self.handle)


class AclStream:
    """A stream of the device that the calling thread has set."""

    def __init__(self) -> None:
        handle = c_void_p()
        _call_acl("aclrtCreateStream", byref(handle))
        assert handle.value is not None
        self.handle = handle.value
        _call_acl("aclrtSetStreamFailureMode", self.handle, _STOP_ON_FAILURE)

    def wait_for_stream(self, stream: Any) -> AclEvent | None:
        """Have later work of this stream wait for what ``stream``, one of torch's, has queued up to now.

        Returns the event between the two, to be kept until it is complete; None where ``stream`` is idle. The event is
        CANN's own: one of torch's would go through torch_npu's task queue, which is another thread and back.
        """
        if stream.query():
            return None
        event = AclEvent(acl_handle(stream))
        try:
            _call_acl("aclrtStreamWaitEvent", self.handle, event.handle)
        except HcclError:
            event.destroy()
            raise
        return event

    def record_event(self) -> AclEvent:
        """Record an event at the present end of the stream."""
        return AclEvent(self.handle)

    def synchronize(self, limit_s: float) -> bool:
        """Wait for ``limit_s`` seconds at most; return whether all work has ended.

        Raises HcclError where an error has stopped the stream.
        """
        milliseconds = max(1, int(limit_s * 1000))
        return not _call_acl("aclrtSynchronizeStreamWithTimeout", self.handle, milliseconds, allowed=_TIMEOUTS)

    def destroy(self) -> None:
        """Destroy the stream, whatever it is doing."""
        _call_acl("aclrtDestroyStreamForce", self.handle)


def set_op_wait_timeout(seconds: int) -> None:
    """Limit the wait of a stream for an event, in this process; 0: without limit, which is CANN's default."""
    _call_acl("aclrtSetOpWaitTimeout", seconds)


def acl_handle(stream: Any) -> c_void_p:
    """Return CANN's handle of one of torch's streams. torch_npu first submits to it what its own task queue holds.

    Raises HcclError where that failed: torch_npu then returns 0, which to CANN is another stream, the default one.
    """
    handle = int(stream.npu_stream)
    if not handle:
        raise HcclError(
            "VRA-547",
            "torch_npu could not submit the work of its stream: an operator before this transfer has failed. Its error "
            "is in the log before this; ASCEND_LAUNCH_BLOCKING=1 raises it where it occurs.",
            HCCL_E_RUNTIME,
        )
    return c_void_p(handle)


def _call_acl(name: str, *arguments: Any, allowed: tuple[int, ...] = ()) -> int:
    """Call a function of libascendcl; return 0 or one of the ``allowed`` codes, raise HcclError for all others."""
    code = int(getattr(_load_library(), name)(*arguments))
    if code and code not in allowed:
        detail = recent_error_message()
        meaning = npu_errors.explain_text(f"CANN error {code}") or "Look for the first error in the logs of all ranks."
        reason = f" ({detail})" if detail else ""
        raise HcclError("VRA-504", f"{name} failed with CANN error {code}{reason}. {meaning}", HCCL_E_RUNTIME)
    return code


@cache
def _load_library() -> ctypes.CDLL:
    library = ctypes.CDLL("libascendcl.so")
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library
