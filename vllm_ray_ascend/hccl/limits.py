"""Time limits of communicators, from our settings and HCCL's variables. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

_TRANSFER_LIMIT_S = 120.0
_EXEC_TIMEOUT_SHARE = 0.8
_EXEC_TIMEOUT_S = 1836.0
_CONNECT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_GRACE_S = 20.0
"""What HCCL adds, in which all ranks learn why a communicator was not made (CANN, HCCL_CONNECT_TIMEOUT)."""
_OP_WAIT_GRACE_S = 30


def transfer_limit_s(setting_s: float, environ: Mapping[str, str]) -> float:
    """Return the limit of a transfer in seconds: the setting, else 120.

    It is less than 120 where HCCL's own timeout would come sooner, whose message says less.
    """
    return setting_s or min(_TRANSFER_LIMIT_S, _EXEC_TIMEOUT_SHARE * exec_timeout_s(environ))


def exec_timeout_s(environ: Mapping[str, str]) -> float:
    """Return HCCL_EXEC_TIMEOUT in seconds: a fraction is valid on Atlas A3, and 0 is no limit.

    Atlas 300I and the training series of before A2 round it down to a multiple of 68 s; there it may be shorter.
    """
    seconds = _seconds(environ.get("HCCL_EXEC_TIMEOUT", ""), _EXEC_TIMEOUT_S)
    return seconds or math.inf


def op_wait_timeout_s(environ: Mapping[str, str]) -> int:
    """Return how long a stream may wait for an event, in whole seconds; 0 where there is no limit.

    HCCL's own limit comes first, as with torch_npu's process groups.
    """
    seconds = exec_timeout_s(environ)
    return 0 if math.isinf(seconds) else math.ceil(seconds) + _OP_WAIT_GRACE_S


def connect_limit_s(environ: Mapping[str, str]) -> float:
    """Return the seconds for which HCCL waits for the other ranks: HCCL_CONNECT_TIMEOUT and 20."""
    return _seconds(environ.get("HCCL_CONNECT_TIMEOUT", ""), _CONNECT_TIMEOUT_S) + _CONNECT_TIMEOUT_GRACE_S


def _seconds(text: str, default: float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return default
    return seconds if 0 <= seconds < math.inf else default
