"""The runtime's C functions, called without torch."""

from __future__ import annotations

import ctypes
import os
from functools import cache

OK = 0
WAIT_TIMEOUT = 107019
STREAM_UNJOINED = 107025
STREAM_CAPTURED = 107027
EVENT_CAPTURED = 107028
FORBIDDEN_IN_CAPTURE = 107030
NO_STREAM = 207008
SYNC_TIMEOUT = 507046
CAPTURE_INVALIDATED = 507903


@cache
def runtime() -> ctypes.CDLL:
    """libascendcl.so, the one that torch_npu uses in this process."""
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
        self._callbacks: list[object] = []  # ctypes frees a callback that nobody holds
        equal = 1
        assert runtime().aclrtValueWait(ctypes.byref(self._value), ctypes.c_uint64(1), equal, self.handle) == OK

    def open(self) -> None:
        self._value.value = 1

    def note(self, number: int) -> None:
        """Queues a host function that appends the number to `seen`."""
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.seen.append(number))
        self._callbacks.append(callback)
        assert runtime().aclrtLaunchHostFunc(self.handle, callback, None) == OK

    def synchronize(self, limit_ms: int = 30_000) -> int:
        return int(runtime().aclrtSynchronizeStreamWithTimeout(self.handle, limit_ms))
