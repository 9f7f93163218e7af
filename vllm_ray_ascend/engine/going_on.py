"""An engine core that goes on with new workers, where vLLM's ends with its first dead one (VLLM_RAY_ASCEND_RECOVER=1).

Requests that had begun fail, with finish reason "error" (HTTP 500): what they had on the NPUs is lost, the state of
their sampling too, and one of them may be what killed the worker. Those that still wait are served by the new workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, FinishReason
from vllm.v1.engine import core as vllm_core
from vllm.v1.request import RequestStatus

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_BEGUN = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)
_FIRST_WORD_S = 2.0
"""An answer of a worker may come before its word that it has failed."""
_HANDLE = "_handle_client_request"

Outputs = dict[int, EngineCoreOutputs]


def let_engines_go_on() -> None:
    """Have vLLM's engine core try `go_on` where a step fails and where its executor reports a failure."""
    for name in ("step", "step_with_batch_queue"):
        replace(vllm_core.EngineCore, name, _step(upstream(vllm_core.EngineCore, name)))
    replace(vllm_core.EngineCoreProc, _HANDLE, _handle(upstream(vllm_core.EngineCoreProc, _HANDLE)))


def go_on(engine: Any, limit_s: float = 0.0) -> Outputs | None:
    """Fail what had begun and restart the workers: outputs by client, where nobody sends them yet.

    None where the executor has not failed, waited for ``limit_s`` seconds, or may not restart its workers.
    """
    if not engine.model_executor.may_restart(limit_s):
        return None
    failed = end_begun(engine)
    send = getattr(engine, "output_queue", None)
    if send is not None:  # clients need not wait for the new workers
        for each in failed.items():
            send.put_nowait(each)
        failed = {}
    engine.model_executor.restart()
    return failed


def end_begun(engine: Any) -> Outputs:
    """Take requests that had begun from the scheduler, with batches under way and all cached KV blocks."""
    scheduler = engine.scheduler
    begun: dict[int, list[str]] = {}
    for request in scheduler.requests.values():
        if request.status in _BEGUN:
            begun.setdefault(request.client_index, []).append(request.request_id)
    ended = [identity for each in begun.values() for identity in each]
    scheduler.finish_requests(ended, RequestStatus.FINISHED_ERROR)
    if engine.batch_queue:
        engine.batch_queue.clear()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    logger.warning("%d requests had begun and failed, %d wait", len(ended), len(scheduler.requests))
    return {
        client: EngineCoreOutputs(
            outputs=[EngineCoreOutput(identity, [], finish_reason=FinishReason.ERROR) for identity in identities],
            finished_requests=set(identities),
        )
        for client, identities in begun.items()
    }


def _step(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(step)
    def stepping(engine: Any) -> Any:
        try:
            return step(engine)
        except Exception:
            failed = go_on(engine, _FIRST_WORD_S)
            if failed is None:
                raise
            return failed, False

    return stepping


def _handle(handle: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(handle)
    def handling(engine: Any, request_type: Any, request: Any) -> None:
        if request_type == EngineCoreRequestType.EXECUTOR_FAILED and (_seen_to(engine) or go_on(engine) is not None):
            return
        handle(engine, request_type, request)

    return handling


def _seen_to(engine: Any) -> bool:
    """Whether a step has met the same failure before, and the workers are new ones already."""
    return engine.model_executor.cause is None
