"""The API server's part in a scaling: a preparation that fails is undone, ranks that leave finish their requests."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.elastic_ep.admission import check_ranks_up, check_size, weights_obstacle
from vllm_ray_ascend.elastic_ep.rendezvous import FailureReports
from vllm_ray_ascend.engine.calls import WEIGHT_CALLS
from vllm_ray_ascend.engine.rank_client import describe_ranks_down, ranks_not_lost, show_ranks
from vllm_ray_ascend.errors import ElasticEPError
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_CLIENT = "vllm.v1.engine.core_client.DPLBAsyncMPClient"
_POLL_S = 0.2
_ROLL_BACK_LIMIT_S = 300.0
_UNWIND_S = 30.0
"""How long a preparation may take to end once everything that it waits for has ended."""
_ROLL_BACK_POLL_S = 1.0
"""Between two requests to roll back, in which the ranks serve."""
_LEAVE_S = 30.0
"""How long ranks that leave may take, after the commit, to say that they have."""
_SHUTDOWN_COMPLETE = "SHUTDOWN_COMPLETE"
"""Value of vLLM's EEPNotificationType: a rank that leaves needs the others no more."""
_DRAIN_S = 120.0
"""Seconds in which ranks that leave may finish their requests, unless the request to scale says otherwise."""
_ENDPOINTS = ("data_parallel_master_port", "_data_parallel_master_port_list", "_coord_store_port")
"""Of a ParallelConfig: where ranks meet, which each scaling changes."""
_ENGINES = ("lb_engines", "engine_ranks_managed")
"""Of a client: the ranks that get requests, which draining changes."""

Method = Callable[..., Coroutine[Any, Any, Any]]


def install() -> None:
    """Guard the scalings of this process's clients."""
    patches.wrap(f"{_CLIENT}.prepare_elastic_ep", _watched)
    patches.wrap(f"{_CLIENT}.commit_elastic_ep", _closing_on_failure)
    patches.wrap("vllm.v1.engine.core_client.AsyncMPClient.collective_rpc_async", _noting_changes)


def guard_frontend(module: ModuleType) -> None:
    """Guard the scalings of AsyncLLM, of the ``module`` that has it: a failure leaves no server that answers 503."""
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM._scale_elastic_ep", _with_rollback)


def explain_failures(module: ModuleType) -> None:
    """Let the answer to a request to scale contain why it failed. ``module`` is the one with its route."""

    class ExplainedError(module.HTTPException):  # type: ignore[name-defined]
        def __init__(self, status_code: int, detail: str) -> None:
            cause = sys.exc_info()[1]
            super().__init__(status_code, f"{detail}: {cause}" if status_code == 500 and cause else detail)

    patches.apply("vllm.entrypoints.serve.elastic_ep.api_router.HTTPException", ExplainedError)


@dataclass
class _Scaling:
    """A scaling that has not reached the commit: what is restored when it is undone."""

    present: int
    size: int
    endpoints: dict[str, Any]
    engines: dict[str, Any]
    task: asyncio.Future[Any] | None = None
    """Prepares it."""


class _RankLostError(Exception):
    """A rank that was to join is lost or would be wrong, or one that serves cannot prepare the scaling."""


def _with_rollback(scale: Method) -> Method:
    """Return `_scale_elastic_ep`, which undoes a scaling that fails before the commit, and ends the answers with 503.

    It lets the client know the limit for draining.
    """

    @functools.wraps(scale)
    async def scale_or_roll_back(engine: Any, new_data_parallel_size: int, drain_timeout: int) -> None:
        from vllm.entrypoints.serve.elastic_ep.middleware import set_scaling_elastic_ep

        client = engine.engine_core
        client._vllm_ray_ascend_drain_s = drain_timeout
        try:
            await scale(engine, new_data_parallel_size, drain_timeout)
        except ElasticEPError:  # ranks that serve are lost, or it was refused
            if (scaling := _unfinished(client)) is not None:
                await asyncio.shield(asyncio.ensure_future(_abandon(client, scaling)))
            raise
        except BaseException as error:  # a cancelled request too: the ranks that serve have to roll back as well
            set_scaling_elastic_ep(False)  # they serve meanwhile
            if (scaling := _unfinished(client)) is None:
                raise
            cause = str(error) if isinstance(error, _RankLostError) else f"{type(error).__name__}: {error}"
            await asyncio.shield(asyncio.ensure_future(_roll_back(client, scaling, cause)))
            if not isinstance(error, Exception):
                raise
            raise ElasticEPError(
                "VRA-343",
                f"scaling from {scaling.present} to {scaling.size} data parallel ranks failed and was undone, the "
                f"{scaling.present} ranks continue: {cause}",
            ) from error
        finally:
            client._vllm_ray_ascend_scaling = None
            set_scaling_elastic_ep(False)

    return scale_or_roll_back


def _unfinished(client: Any) -> _Scaling | None:
    """Return the scaling that has begun and not reached the commit; None where upstream has refused to begin it."""
    scaling: _Scaling | None = getattr(client, "_vllm_ray_ascend_scaling", None)
    config = client.vllm_config.parallel_config
    begun = scaling is not None and config._coord_store_port != scaling.endpoints["_coord_store_port"]
    return scaling if begun else None


def _noting_changes(call: Method) -> Method:
    """Return `collective_rpc_async`, which notes the call that has changed the weights of the workers there are."""

    @functools.wraps(call)
    async def call_and_note(client: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method in WEIGHT_CALLS:
            client._vllm_ray_ascend_changed_by = method
        return await call(client, method, *args, **kwargs)

    return call_and_note


def _weights_obstacle(client: Any, size: int) -> str:
    return weights_obstacle(getattr(client, "_vllm_ray_ascend_changed_by", ""), len(client.core_engines), size)


def _watched(prepare: Method) -> Method:
    """Return `prepare_elastic_ep`, which fails as soon as a rank does. Ranks that leave are drained."""

    @functools.wraps(prepare)
    async def prepare_watched(client: Any, new_data_parallel_size: int) -> None:
        manager = client.resources.engine_manager
        check_size(new_data_parallel_size, manager.given_ranks())
        check_ranks_up(describe_ranks_down(client))
        if obstacle := _weights_obstacle(client, new_data_parallel_size):
            raise ElasticEPError(
                "VRA-169",
                f"the engine is not scaled to {new_data_parallel_size} data parallel ranks: {obstacle}. Save the new "
                "weights, start the server with them, and scale that; fewer ranks are possible now.",
            )
        manager.begin_scaling()
        await _roll_back_engines(client, "see the answer to an earlier request")
        config, present = client.vllm_config.parallel_config, len(client.core_engines)
        scaling = client._vllm_ray_ascend_scaling = _Scaling(
            present,
            new_data_parallel_size,
            {name: getattr(config, name) for name in _ENDPOINTS},
            {name: getattr(client, name) for name in _ENGINES},
        )
        scaling.task = asyncio.ensure_future(prepare(client, new_data_parallel_size))
        cause = await _first_failure(client, scaling.task, scaling.endpoints["_coord_store_port"])
        if cause:
            raise _RankLostError(cause)
        await scaling.task
        if new_data_parallel_size < present:
            await _drain(client, new_data_parallel_size)

    return prepare_watched


async def _first_failure(client: Any, task: asyncio.Future[Any], old_port: int) -> str:
    """Return why a preparation cannot succeed, as soon as that is known; empty once ``task``, which does it, ends."""
    config, manager = client.vllm_config.parallel_config, client.resources.engine_manager
    present = len(client.core_engines)
    reports: FailureReports | None = None
    while not await _is_done(client, task):
        for loss in manager.lost_in_scaling():
            return str(loss.text)
        if reports is None and config._coord_store_port != old_port:
            reports = await asyncio.to_thread(FailureReports, config.data_parallel_master_ip, config._coord_store_port)
        if reports is not None and (report := reports.first(range(present))):
            return report
    return ""


async def _roll_back(client: Any, scaling: _Scaling, cause: str) -> None:
    """End the ranks that were to join, have the others roll back, and restore what the client has changed."""
    config, manager = client.vllm_config.parallel_config, client.resources.engine_manager
    port = config._coord_store_port
    try:
        await asyncio.to_thread(manager.roll_back_scale_up)
        reports = FailureReports(config.data_parallel_master_ip, port)
        reports.release(f"eep_ready/{rank}" for rank in range(scaling.size))
        if scaling.task is not None:
            await _end_task(client, scaling.task)
    finally:
        _restore(client, scaling)
        await _roll_back_engines(client, cause)


async def _abandon(client: Any, scaling: _Scaling) -> None:
    """End the ranks that were to join, where ranks that serve are lost: all of these end too, or are restarted."""
    if scaling.task is not None:
        scaling.task.cancel()
    try:
        await asyncio.to_thread(client.resources.engine_manager.roll_back_scale_up)
    finally:
        _restore(client, scaling)


def _restore(client: Any, scaling: _Scaling) -> None:
    """Let a client be as it was before a scaling."""
    config = client.vllm_config.parallel_config
    client._prepared_elastic_ep = None
    for name, value in scaling.engines.items():
        setattr(client, name, value)
    for name, value in scaling.endpoints.items():
        setattr(config, name, value)


async def _end_task(client: Any, task: asyncio.Future[Any]) -> None:
    """Wait for the end of a preparation that has failed; its error is known, or only follows."""
    deadline = time.monotonic() + _UNWIND_S
    while not await _is_done(client, task):
        if time.monotonic() > deadline:
            task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _roll_back_engines(client: Any, cause: str) -> None:
    """Have every engine core undo what it has prepared, because of ``cause``.

    Raises ElasticEPError where one does not within the limit.
    """
    deadline = time.monotonic() + _ROLL_BACK_LIMIT_S
    pending = ranks_not_lost(client)
    while pending:
        calls = (client._call_utility_async("roll_back_elastic_ep", engine=engine) for engine in pending)
        gathered = asyncio.gather(*calls, return_exceptions=True)
        while not await _is_done(client, gathered):
            pass
        answers = gathered.result()
        pending = [engine for engine, answer in zip(pending, answers, strict=True) if answer is not True]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if errors or (pending and time.monotonic() > deadline):
            raise ElasticEPError(
                "VRA-344",
                f"{len(pending)} engine cores have not undone a failed scaling within {_ROLL_BACK_LIMIT_S:g} s "
                f"({errors[0] if errors else 'a rank waits in gloo or HCCL'}). They continue; a further scaling is "
                f"refused until they have. Restart the server to scale it before. The scaling failed because: {cause}",
            )
        if pending:
            await asyncio.sleep(_ROLL_BACK_POLL_S)


async def _is_done(
    client: Any, future: asyncio.Future[Any], needed: range | None = None, leaving: range = range(0)
) -> bool:
    """Wait for ``future`` for a moment, and return whether it is done.

    Raises ElasticEPError where one of the ``needed`` ranks, by default those that serve, is lost: who asks it gets no
    answer. Those ``leaving`` are needed until they have left.
    """
    needed = range(len(client.core_engines)) if needed is None else needed
    await asyncio.wait([future], timeout=_POLL_S)
    if _lost(client, needed, leaving) and not future.done():
        await asyncio.wait([future], timeout=_POLL_S)  # one that leaves has said so before, which may be read now
    if not future.done():
        try:
            _raise_if_lost(client, needed, leaving)
        except ElasticEPError:
            future.cancel()
            raise
    return future.done()


def _raise_if_lost(client: Any, needed: range, leaving: range = range(0)) -> None:
    lost = _lost(client, needed, leaving)
    if lost or client.resources.engine_dead:
        raise ElasticEPError(
            "VRA-347",
            f"a rank was lost without which the engine cannot be scaled: {', '.join(lost) or 'the log says which'}",
        )


def _lost(client: Any, ranks: range, leaving: range) -> list[str]:
    """Return the losses of ``ranks``, but for those ``leaving`` that have left."""
    cache = client.eep_scaling_cache  # none once all have
    notified = {} if cache is None else {each.value: ranks for each, ranks in cache.pending_notifications.items()}
    left = leaving if cache is None else notified.get(_SHUTDOWN_COMPLETE, ())
    lost = client.resources.engine_manager.lost_in_scaling()
    return [loss.text for loss in lost if loss.rank in ranks and loss.rank not in left]


async def _drain(client: Any, new_data_parallel_size: int) -> None:
    """Send nothing more to the ranks that leave, and wait until they have finished, or the limit is over."""
    leaving = client.core_engines[new_data_parallel_size:]
    client.lb_engines = client.lb_engines[:new_data_parallel_size]
    client.engine_ranks_managed = client.engine_ranks_managed[:new_data_parallel_size]
    limit_s = getattr(client, "_vllm_ray_ascend_drain_s", _DRAIN_S)
    deadline = time.monotonic() + limit_s
    while (running := sum(client.engine_inflight[engine] for engine in leaving)) and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
        _raise_if_lost(client, range(len(client.core_engines)))
    if running:
        logger.warning(
            "VRA-345: %d requests of the ranks that leave were not done after %g s and are aborted; a longer "
            '"drain_timeout" in the request to scale lets them finish',
            running,
            limit_s,
        )


def _closing_on_failure(commit: Method) -> Method:
    """Return `commit_elastic_ep`, after whose failure no engine continues: the ranks disagree about their number.

    Where a rank was lost after it was ready, nothing is committed.
    """

    @functools.wraps(commit)
    async def commit_or_end(client: Any) -> None:
        manager = client.resources.engine_manager
        if lost := manager.lost_in_scaling():
            raise _RankLostError(lost[0].text)
        if obstacle := _weights_obstacle(client, client._vllm_ray_ascend_scaling.size):
            raise _RankLostError(obstacle)
        scaling, client._vllm_ray_ascend_scaling = client._vllm_ray_ascend_scaling, None
        manager.begin_commit()
        task = asyncio.ensure_future(commit(client))
        try:
            leaving = range(scaling.size, scaling.present)
            while not await _is_done(client, task, range(max(scaling.present, scaling.size)), leaving):
                pass
            await task
            await _let_ranks_leave(client, scaling, leaving)
            manager.end_commit(client.vllm_config)
            show_ranks(client, scaling.present)
        except BaseException as error:  # whatever it is, no rank knows which experts the others have
            logger.error("VRA-346: the ranks failed while they committed another size, which ends all: %s", error)
            task.cancel()
            await asyncio.to_thread(manager.shutdown)
            raise

    return commit_or_end


async def _let_ranks_leave(client: Any, scaling: _Scaling, leaving: range) -> None:
    """Wait until ranks that leave say that they have; end them where they are lost, or late."""
    deadline = time.monotonic() + _LEAVE_S
    while client.eep_scaling_cache is not None and time.monotonic() < deadline and not _lost(client, leaving, leaving):
        await asyncio.sleep(_POLL_S)
    if client.eep_scaling_cache is not None:
        manager = client.resources.engine_manager
        client.eep_scaling_cache = None
        manager.scale_down_elastic_ep(scaling.present, scaling.size)
        client.vllm_config.parallel_config.data_parallel_size_local = len(manager.local_engine_actors)
