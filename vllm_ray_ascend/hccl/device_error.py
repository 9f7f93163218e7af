"""Whether this process may still use its NPU: after an error on the device it may not, and only a new process may.

torch_npu has its streams stop at an error, which on Atlas A2 and A3 stops every stream of the process ("also applies to
other streams in the context", CANN's aclrtSetStreamFailureMode), so that nothing more can be queued.
"""

from __future__ import annotations

import threading

from vllm_ray_ascend.errors import HcclError
from vllm_ray_ascend.hccl.library import HCCL_E_RUNTIME
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_lock = threading.Lock()
_reason = ""


def declare_unusable(reason: str) -> None:
    """Refuse all later transfers of this process, whose first error on the device is ``reason``."""
    global _reason
    with _lock:
        if _reason:
            return
        _reason = reason
    logger.error(
        "VRA-544: this process can use its NPU no longer, after an error on the device: %s. Replace the process: an "
        "actor by ray.kill(actor) and a new one, or let Ray do so (max_restarts).",
        reason,
    )


def raise_if_unusable(what: str) -> None:
    """Raise HcclError where `declare_unusable` was called; ``what`` was to be done."""
    if _reason:
        raise HcclError(
            "VRA-545",
            f"There is no {what}: this process can use its NPU no longer, as an error on the device stops all its "
            f"streams. Replace the process, such as an actor: ray.kill(actor), then a new one. The error: {_reason}",
            HCCL_E_RUNTIME,
        )
