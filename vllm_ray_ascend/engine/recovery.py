"""Recovery of an engine core with new workers, where vLLM's ends with its first dead one (VLLM_RAY_ASCEND_RECOVER=1).

Requests that were running fail, with finish reason "error" (HTTP 500): their KV cache on the NPUs is lost, the state of
their sampling too, and one of them may be what killed the worker. Waiting requests are served by the new workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.request import RequestStatus

from vllm_ray_ascend import patches
from vllm_ray_ascend.engine.rank_status import RANK_DOWN, RANK_UP, RankStatus, error_output, notify_clients
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS, REQUESTS_ABORTED
from vllm_ray_ascend.observability.metrics import ABORTED, VALUES

logger = get_logger(__name__)

_BEGUN = (RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.WAITING_FOR_STREAMING_REQ)
_FAILURE_REPORT_S = 2.0
"""A worker's response may arrive before its failure report does."""

Outputs = dict[int, EngineCoreOutputs]

_unsent: dict[int, Outputs] = {}
"""For an engine core (its id) without an output queue: outputs of aborted requests that its next step returns."""


def install() -> None:
    """Have vLLM's engine core try `recover` where a step fails and where its executor reports a failure."""
    patches.wrap("vllm.v1.engine.core.EngineCore.step", _recovering_step)
    patches.wrap("vllm.v1.engine.core.EngineCore.step_with_batch_queue", _recovering_step)
    patches.wrap("vllm.v1.engine.core.EngineCore.post_step", _recovering_post_step)
    patches.wrap("vllm.v1.engine.core.EngineCoreProc._handle_client_request", _recovering_handler)


def recover(engine: Any, limit_s: float = 0.0) -> Outputs | None:
    """Abort the running requests and restart the workers. Return outputs by client, where nobody has sent them yet.

    Return None where the executor has not failed within ``limit_s`` seconds, or may not restart its workers.
    """
    if not engine.model_executor.can_restart(limit_s):
        return None
    aborted = abort_running_requests(engine)
    _notify(engine, RANK_DOWN)
    queue = getattr(engine, "output_queue", None)
    if queue is not None:  # clients need not wait for the new workers
        for each in aborted.items():
            queue.put_nowait(each)
        aborted = {}
    engine.model_executor.restart()
    _notify(engine, RANK_UP)
    return aborted


def _notify(engine: Any, kind: str) -> None:
    """Let API servers send requests to other ranks meanwhile, if there are any."""
    if getattr(engine, "restarts_ranks", False):
        notify_clients(engine, kind, RankStatus(engine.engine_index, "its workers are restarted"))


def abort_running_requests(engine: Any) -> Outputs:
    """Remove requests that had begun from the scheduler, with batches in flight and all that it takes workers to hold.

    What stays belongs to this process or to waiting requests: their grammars, and the inputs that API servers have
    sent once and do not send again (mm_receiver_cache).
    """
    scheduler = engine.scheduler
    started: dict[int, list[str]] = {}
    pooling = {request.request_id for request in scheduler.requests.values() if request.pooling_params is not None}
    for request in scheduler.requests.values():
        if has_begun(request):
            started.setdefault(request.client_index, []).append(request.request_id)
    aborted = [request_id for each in started.values() for request_id in each]
    scheduler.finish_requests(aborted, RequestStatus.FINISHED_ERROR)
    if engine.batch_queue:
        engine.batch_queue.clear()
    _forget_workers(scheduler)
    logger.warning("VRA-307: aborted %d running requests; %d are waiting", len(aborted), len(scheduler.requests))
    VALUES.add(ABORTED, len(aborted))
    EVENTS.emit(REQUESTS_ABORTED, aborted=len(aborted), waiting=len(scheduler.requests))
    return {
        client: EngineCoreOutputs(
            outputs=[error_output(request_id, request_id in pooling) for request_id in request_ids],
            finished_requests=set(request_ids),
        )
        for client, request_ids in started.items()
    }


def has_begun(request: Any) -> bool:
    """Return whether workers hold something of a request: KV blocks of a step, or of a session's earlier inputs.

    A session whose next input has arrived is WAITING, with what was computed for the inputs before.
    """
    return request.status in _BEGUN or request.num_computed_tokens > 0


def _forget_workers(scheduler: Any) -> None:
    """Clear what the scheduler records of its workers: KV blocks, encoder outputs, requests to remove from a batch."""
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.encoder_cache_manager.reset()
    scheduler.finished_req_ids = set()
    # Of steps whose output never comes; vLLM 0.33 has a connector instead, which reset_prefix_cache resets.
    if getattr(scheduler, "enable_return_routed_experts", False):
        scheduler._re_block_ids.clear()


def _recovering_step(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(step)
    def recovering_step(engine: Any) -> Any:
        if (unsent := _unsent.pop(id(engine), None)) is not None:
            return unsent, False
        try:
            return step(engine)
        except Exception:  # whatever it is: `recover` knows whether a worker's failure was its cause
            outputs = recover(engine, _FAILURE_REPORT_S)
            if outputs is None:
                raise
            return outputs, False

    return recovering_step


def _recovering_post_step(post_step: Callable[[Any, bool], None]) -> Callable[[Any, bool], None]:
    """Return `post_step`, which asks workers for draft tokens and returns nothing: outputs wait for the next step."""

    @functools.wraps(post_step)
    def recovering_post_step(engine: Any, model_executed: bool) -> None:
        try:
            post_step(engine, model_executed)
        except Exception:  # as in a step
            outputs = recover(engine, _FAILURE_REPORT_S)
            if outputs is None:
                raise
            if outputs:
                _unsent[id(engine)] = outputs

    return recovering_post_step


def _recovering_handler(handle: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(handle)
    def recovering_handler(engine: Any, request_type: Any, request: Any) -> None:
        if request_type == EngineCoreRequestType.EXECUTOR_FAILED and (
            _already_recovered(engine) or recover(engine) is not None
        ):
            return
        handle(engine, request_type, request)

    return recovering_handler


def _already_recovered(engine: Any) -> bool:
    """Return whether a step has detected the same failure before, so that the workers are new ones already."""
    return engine.model_executor.cause is None
