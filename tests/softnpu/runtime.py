"""The runtime's C functions, called without torch."""

from __future__ import annotations

import ctypes
import os
from functools import cache

OK = 0
BAD_ARGUMENT = 107000
NO_CONTEXT = 107002
OTHER_CONTEXT = 107003
WAIT_TIMEOUT = 107019
STREAM_UNJOINED = 107025
STREAM_CAPTURED = 107027
EVENT_CAPTURED = 107028
FORBIDDEN_IN_CAPTURE = 107030
NULL_STREAM_IN_CAPTURE = 107031
NOT_SUPPORTED = 207000
NO_STREAM = 207008
RESET_TOO_OFTEN = 507007
DEVICE_ERROR = 507015
SYNC_TIMEOUT = 507046
EVENT_TIMEOUT = 507047
CAPTURE_INVALIDATED = 507903
CONTINUE_ON_FAILURE, STOP_ON_FAILURE = 0, 1
CAPTURE_GLOBAL, CAPTURE_RELAXED = 0, 2


@cache
def runtime() -> ctypes.CDLL:
    """Load libascendcl.so, the one that torch_npu uses in this process."""
    return ctypes.CDLL(os.path.join(os.environ["SOFTNPU_LIB"], "libascendcl.so"))


def recent_error() -> str:
    library = runtime()
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return str(library.aclGetRecentErrMsg().decode())


class RawStream:
    """A stream of the runtime without torch_npu, held back from the start by a value that the host writes."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        assert runtime().aclrtCreateStream(ctypes.byref(self.handle)) == OK, recent_error()
        self._value = ctypes.c_uint64(0)
        self.seen: list[int] = []
        self._callbacks: list[object] = []  # ctypes frees a callback without a reference
        equal = 1
        assert runtime().aclrtValueWait(ctypes.byref(self._value), ctypes.c_uint64(1), equal, self.handle) == OK

    def fail(self) -> None:
        """Queue a memset. The fault "device_error:device=0,task=memset" makes it fail on the device."""
        self._target = (ctypes.c_byte * 8)()
        assert runtime().aclrtMemsetAsync(self._target, ctypes.c_size_t(8), 1, ctypes.c_size_t(8), self.handle) == OK

    def set_failure_mode(self, mode: int) -> int:
        return int(runtime().aclrtSetStreamFailureMode(self.handle, ctypes.c_uint64(mode)))

    def record(self) -> ctypes.c_void_p:
        """Return a new event, which the stream records behind what it was given."""
        event = ctypes.c_void_p()
        assert runtime().aclrtCreateEventExWithFlag(ctypes.byref(event), ctypes.c_uint32(8)) == OK, recent_error()
        assert runtime().aclrtRecordEvent(event, self.handle) == OK, recent_error()
        return event

    def open(self) -> None:
        self._value.value = 1

    def note(self, number: int) -> None:
        """Queue a host function that appends the number to `seen`."""
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.seen.append(number))
        self._callbacks.append(callback)
        assert runtime().aclrtLaunchHostFunc(self.handle, callback, None) == OK

    def synchronize(self, limit_ms: int = 30_000) -> int:
        return int(runtime().aclrtSynchronizeStreamWithTimeout(self.handle, limit_ms))
