"""Failures of workers in vLLM's own status of fault tolerance (`--enable-fault-tolerance`, /fault_tolerance/status).

vLLM learns by itself that the executor has failed, and reports "dead", without a reason: the first cause is added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.engine.metrics import send_to_client


def install() -> None:
    """Have the engine core of this process add the first cause to vLLM's status "dead"; vLLM 0.27 and later."""
    patches.wrap("vllm.v1.fault_tolerance.engine_core_sentinel.EngineCoreSentinel.on_fault", _with_cause)


def _with_cause(on_fault: Callable[[Any, Exception], None]) -> Callable[[Any, Exception], None]:
    @functools.wraps(on_fault)
    def on_fault_with_cause(sentinel: Any, error: Exception) -> None:
        on_fault(sentinel, error)
        cause = getattr(sentinel.engine.model_executor, "cause", None)
        if cause is not None:
            from vllm.v1.engine import FT_STATUS_CALL_ID

            status = {"id": sentinel.engine_index, "status": "dead", "fault_info": str(cause)}
            send_to_client(sentinel.engine, FT_STATUS_CALL_ID, status)

    return on_fault_with_cause
