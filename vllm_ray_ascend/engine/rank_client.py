"""The API server's part where a data parallel rank is down: its requests fail immediately, the other ranks serve.

vLLM's client does not know of ranks that are down: it would wait for their answers, and send them further requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from vllm_ray_ascend import patches
from vllm_ray_ascend.engine.calls import IDEMPOTENT_UTILITIES
from vllm_ray_ascend.engine.metrics import hide, show
from vllm_ray_ascend.engine.rank_status import (
    RANK_DOWN,
    RANK_UP,
    SIZE_CHANGED,
    RankStatus,
    SizeStatus,
    error_output,
)
from vllm_ray_ascend.errors import RankDownError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.metrics import DP_RANK_RESTARTS, DP_RANK_UP, Metric, Sample
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_CLIENT = "vllm.v1.engine.core_client.DPLBAsyncMPClient"
_CALL = "vllm.v1.engine.core_client.AsyncMPClient._call_utility_async"
_RETRY_S = 2.0
_BUSY = 1 << 40
"""Requests that the load balancer is made to count for a rank that is down, so that it prefers any other."""

Method = Callable[..., Awaitable[Any]]
Generate = Callable[..., AsyncGenerator[Any, None]]
Engine = bytes
"""vLLM's name of an engine core, of its rank."""


class RankStates:
    """What one client knows of its ranks."""

    def __init__(self) -> None:
        self.down: dict[Engine, str] = {}
        """Why, for each rank that takes no requests."""
        self.lost: set[Engine] = set()
        """Those of them whose engine core is gone: no answer comes until a new one has connected."""
        self.calls: dict[Engine, set[asyncio.Future[Any]]] = {}
        """Utility calls that are waiting for an answer."""
        self.connecting: dict[Engine, asyncio.Task[None]] = {}
        """Waits for new engine cores to answer."""
        self.restarts: Counter[Engine] = Counter()

    def describe(self) -> str:
        """Return which ranks are down, and why."""
        return "; ".join(f"data parallel rank {_rank(engine)} is down: {cause}" for engine, cause in self.down.items())


_states: weakref.WeakKeyDictionary[Any, RankStates] = weakref.WeakKeyDictionary()
"""Of each client in this process."""


def install() -> None:
    """Let the clients of this process continue without ranks that are down."""
    from vllm.v1.engine.core_client import AsyncMPClient

    patches.wrap(f"{_CLIENT}.__init__", _with_states)
    patches.wrap(f"{_CLIENT}.get_core_engine_for_request", _avoiding_ranks_down)
    patches.wrap(f"{_CLIENT}.call_utility_async", _calling_ranks_up)
    patches.wrap(f"{_CLIENT}.eep_process_engine_core_notification", _handling_status)
    patches.wrap("vllm.v1.engine.core_client.DPAsyncMPClient.add_request_async", _failing_requests)
    patches.wrap(_CALL, _failing_calls)
    if hasattr(AsyncMPClient, "call_utility_all_async"):  # vLLM 0.32 and later
        patches.wrap("vllm.v1.engine.core_client.AsyncMPClient.call_utility_all_async", _calling_all_ranks_up)


def report_health() -> None:
    """Let vLLM's health check know of ranks that are down."""
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.check_health", _checking_ranks)


def report_failed_requests() -> None:
    """Let a request that fails before its first token, or a pooling request that fails, end with an error.

    vLLM's streams end without any, as if done, and it knows no pooling request that fails.
    """
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.generate", _raising_first_error)
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.encode", _raising_pooling_error)


def describe_ranks_down(client: Any) -> str:
    """Return which ranks of a client take no requests, and why; empty where all do."""
    states = _states.get(client)
    return states.describe() if states is not None else ""


def ranks_not_lost(client: Any) -> list[Engine]:
    """Return the ranks of a client whose engine cores are there."""
    states = _states.get(client)
    return [engine for engine in client.core_engines if states is None or engine not in states.lost]


def show_ranks(client: Any, before: int) -> None:
    """Show the ranks of a client in /metrics after their number has changed from ``before``; all of them serve."""
    if (states := _states.get(client)) is None:
        return
    for engine in client.core_engines:
        _show(client, DP_RANK_UP, _rank(engine), 1.0)
        _show(client, DP_RANK_RESTARTS, _rank(engine), states.restarts[engine])
    for rank in range(len(client.core_engines), before):
        _hide(client, rank)


def mark_down(client: Any, status: RankStatus) -> None:
    """Send nothing more to a rank. Where its requests are lost, they and its calls fail immediately."""
    states, engine = _states[client], _engine(status.rank)
    if task := states.connecting.pop(engine, None):
        task.cancel()
    states.down[engine] = status.cause
    _show(client, DP_RANK_UP, status.rank, 0.0)
    _report(client, status.rank, {"status": "dead", "fault_info": status.cause})
    if not status.requests_lost:
        return
    states.lost.add(engine)
    lost = [request for request, each in client.reqs_in_flight.items() if each == engine]
    for request in lost:
        del client.reqs_in_flight[request]
    _requests_in_flight(client)[engine] = 0
    if lost:
        logger.warning("VRA-157: aborted %d requests: %s", len(lost), states.describe())
        client.outputs_queue.put_nowait(_error_outputs(client, status.rank, lost))
    for call in states.calls.pop(engine, set()):
        if not call.done():
            call.set_exception(_lost_error(states, engine))


async def mark_up(client: Any, status: RankStatus) -> None:
    """Send requests to a rank again, once it answers."""
    states, engine = _states[client], _engine(status.rank)
    if status.is_new:
        task = states.connecting[engine] = asyncio.ensure_future(_prepare(client, engine))
        await asyncio.wait([task])
        if states.connecting.get(engine) is not task:  # it was lost again
            return
        del states.connecting[engine]
        states.lost.discard(engine)
        states.restarts[engine] += 1
        _show(client, DP_RANK_RESTARTS, status.rank, states.restarts[engine])
    if engine in states.lost:  # its old engine core has sent this before it was lost
        return
    states.down.pop(engine, None)
    client.lb_engines[status.rank] = [0] * len(client.lb_engines[status.rank])
    _show(client, DP_RANK_UP, status.rank, 1.0)
    _report(client, status.rank, {"status": "healthy"})


async def change_size(client: Any, status: SizeStatus) -> None:
    """Forget the ranks that are gone for good, as vLLM does when an engine is scaled down."""
    states, config = _states[client], client.vllm_config.parallel_config
    for engine in client.core_engines[status.ranks :]:
        states.down.pop(engine, None)
        states.lost.discard(engine)
        _hide(client, _rank(engine))
    for name in ("core_engines", "lb_engines", "engine_ranks_managed"):
        setattr(client, name, getattr(client, name)[: status.ranks])
    config.data_parallel_size, config.data_parallel_size_local = status.ranks, status.local_ranks
    config.eplb_config.num_redundant_experts = status.redundant_experts
    client._ensure_stats_update_task()
    await client.first_req_send_socket.send(msgspec.msgpack.encode(("SCALE_ELASTIC_EP", status.ranks)))


async def _prepare(client: Any, engine: Engine) -> None:
    """Wait until a new engine core answers, and pause it where the others are, as while weights are updated."""
    await _wait_for_answer(client, engine)
    serving = [each for each in client.core_engines if each not in _states[client].down]
    if not serving or not hasattr(client, "is_scheduler_paused_async"):
        return
    with contextlib.suppress(RankDownError):  # that one is lost meanwhile
        if await client._call_utility_async("is_scheduler_paused", engine=serving[0]):
            call = patches.original(_CALL)
            await call(client, "pause_scheduler", engine=engine)


async def _wait_for_answer(client: Any, engine: Engine) -> None:
    """Wait until a new engine core answers: until it has connected, what is sent to it is lost without notice."""
    call = patches.original(_CALL)
    attempts: set[asyncio.Future[Any]] = set()
    try:
        while not any(attempt.done() for attempt in attempts):
            attempts.add(asyncio.ensure_future(call(client, "is_sleeping", engine=engine)))
            await asyncio.wait(attempts, timeout=_RETRY_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for attempt in attempts:
            attempt.cancel()


def _with_states(init: Callable[..., None]) -> Callable[..., None]:
    """Return `__init__`, after which a new engine core may take the connection of an old one of the same rank."""

    @functools.wraps(init)
    def init_with_states(client: Any, *args: Any, **kwargs: Any) -> None:
        import zmq

        _states[client] = RankStates()
        init(client, *args, **kwargs)
        client.input_socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        for engine in client.core_engines:
            _show(client, DP_RANK_UP, _rank(engine), 1.0)
            _show(client, DP_RANK_RESTARTS, _rank(engine), 0.0)

    return init_with_states


def _avoiding_ranks_down(choose: Callable[[Any, Any], Engine]) -> Callable[[Any, Any], Engine]:
    """Return `get_core_engine_for_request`, which raises RankDownError where only a rank that is down may be chosen."""

    @functools.wraps(choose)
    def choose_rank_up(client: Any, request: Any) -> Engine:
        states = _states[client]
        for engine in states.down:
            if _rank(engine) < len(client.lb_engines):  # else it is about to leave
                client.lb_engines[_rank(engine)][0] = _BUSY
        engine = choose(client, request)
        if engine in states.down:
            del client.reqs_in_flight[request.request_id]
            _requests_in_flight(client)[engine] -= 1
            raise RankDownError("VRA-159", f"no rank serves a request: {states.describe()}")
        return engine

    return choose_rank_up


def _failing_requests(add_request: Method) -> Method:
    """Return `add_request_async`, which lets a request fail that no rank can serve: vLLM would keep its state."""

    @functools.wraps(add_request)
    async def add_or_fail(client: Any, request: Any) -> None:
        try:
            await add_request(client, request)
        except RankDownError as error:
            logger.warning("%s", error)
            client._ensure_output_queue_task()
            failed = _error_outputs(client, request.data_parallel_rank or 0, [request.request_id])
            client.outputs_queue.put_nowait(failed)

    return add_or_fail


def _calling_ranks_up(call: Method) -> Method:
    """Return `call_utility_async` of all ranks, which leaves out those that are down where that makes no difference."""

    @functools.wraps(call)
    async def call_ranks_up(client: Any, method: str, *args: Any) -> Any:
        if not _states[client].down:
            return await call(client, method, *args)
        return (await _call_ranks_up(client, method, *args))[0]

    return call_ranks_up


def _calling_all_ranks_up(call: Method) -> Method:
    """Return `call_utility_all_async`, which does the same and returns the answers of all ranks."""

    @functools.wraps(call)
    async def call_all_ranks_up(client: Any, method: str, *args: Any) -> Any:
        states = _states.get(client)
        if states is None or not states.down:
            return await call(client, method, *args)
        return await _call_ranks_up(client, method, *args)

    return call_all_ranks_up


async def _call_ranks_up(client: Any, method: str, *args: Any) -> list[Any]:
    """Return the answers of the ranks that are not down. Raises RankDownError where one that is would lack the call."""
    states = _states[client]
    name = args[0] if method == "collective_rpc" and args else method
    up = [engine for engine in client.core_engines if engine not in states.down]
    if name not in IDEMPOTENT_UTILITIES or not up:
        raise RankDownError(
            "VRA-160",
            f"{method} was called on no rank, since one that is down would lack it: {states.describe()}. Call "
            "again once it serves.",
        )
    return await asyncio.gather(*(client._call_utility_async(method, *args, engine=engine) for engine in up))


def _failing_calls(call: Method) -> Method:
    """Return `_call_utility_async` of one rank, which ends with an error when that is lost."""

    @functools.wraps(call)
    async def call_or_fail(client: Any, method: str, *args: Any, engine: Engine) -> Any:
        states = _states.get(client)
        if states is None:
            return await call(client, method, *args, engine=engine)
        if engine in states.lost:  # since the ranks were chosen
            raise _lost_error(states, engine)
        lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(call(client, method, *args, engine=engine))
        calls = states.calls.setdefault(engine, set())
        calls.add(lost)
        try:
            await asyncio.wait([answer, lost], return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else lost.result()
        finally:
            calls.discard(lost)
            answer.cancel()
            lost.cancel()

    return call_or_fail


def _handling_status(handle: Callable[..., Awaitable[None]]) -> Any:
    """Return vLLM's handler of notifications, which handles ours too."""

    @functools.wraps(handle)
    async def handle_status(client: Any, data: Any) -> None:
        kind, status = data
        if kind == RANK_DOWN:
            mark_down(client, msgspec.convert(status, RankStatus))
        elif kind == RANK_UP:
            await mark_up(client, msgspec.convert(status, RankStatus))
        elif kind == SIZE_CHANGED:
            await change_size(client, msgspec.convert(status, SizeStatus))
        else:
            await handle(client, data)

    return staticmethod(handle_status)


def _checking_ranks(check: Method) -> Method:
    @functools.wraps(check)
    async def check_ranks(engine: Any) -> None:
        await check(engine)
        states = _states.get(engine.engine_core)
        if states is None or not states.down:
            return
        if len(states.down) == len(engine.engine_core.core_engines) or load().degraded_health == "503":
            from vllm.v1.engine.exceptions import EngineDeadError

            raise EngineDeadError(states.describe())

    return check_ranks


def _raising_first_error(generate: Generate) -> Generate:
    @functools.wraps(generate)
    async def generate_or_raise(engine: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        begun: set[int] = set()
        """Which of the request's choices (`n`) have a token."""
        async with contextlib.aclosing(generate(engine, *args, **kwargs)) as outputs:
            async for output in outputs:
                begun.update(each.index for each in output.outputs if each.token_ids)
                if any(each.finish_reason == "error" and each.index not in begun for each in output.outputs):
                    raise _generation_error(engine)
                yield output

    return generate_or_raise


def _raising_pooling_error(encode: Generate) -> Generate:
    @functools.wraps(encode)
    async def encode_or_raise(engine: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(encode(engine, *args, **kwargs)) as outputs:
            async for output in outputs:
                if not output.outputs.data.numel():  # of an error_output
                    raise _generation_error(engine)
                yield output

    return encode_or_raise


def _generation_error(engine: Any) -> Exception:
    from vllm.entrypoints.openai.completion.serving import GenerationError  # it has moved, the import not

    states = _states.get(engine.engine_core)
    error: Exception = GenerationError(states.describe() if states and states.down else "the workers failed")
    return error


def _lost_error(states: RankStates, engine: Engine) -> RankDownError:
    return RankDownError("VRA-158", f"data parallel rank {_rank(engine)} is down: {states.down[engine]}")


def _error_outputs(client: Any, rank: int, requests: list[str]) -> Any:
    from vllm.v1.engine import EngineCoreOutputs

    is_pooling = client.vllm_config.model_config.runner_type == "pooling"
    outputs = [error_output(request, is_pooling) for request in requests]
    return EngineCoreOutputs(engine_index=rank, outputs=outputs, finished_requests=set(requests))


def _requests_in_flight(client: Any) -> Counter[Engine]:
    """Return the load balancer's count of requests by rank; one that nobody reads before vLLM 0.27."""
    counts: Counter[Engine] = client.engine_inflight if hasattr(client, "engine_inflight") else Counter()
    return counts


def _show(client: Any, metric: Metric, rank: int, value: float) -> None:
    """Show a value in /metrics, where the user wants metrics; of several API servers the first one does."""
    if client.client_index == 0 and load().metrics == "on":
        config = client.vllm_config.model_config
        show([Sample(metric.name, (), value)], str(config.served_model_name or config.model), str(rank))


def _hide(client: Any, rank: int) -> None:
    """Show no value of a rank any more: an old one would look like a rank that hangs."""
    if client.client_index == 0 and load().metrics == "on":
        config = client.vllm_config.model_config
        hide(str(config.served_model_name or config.model), str(rank))


def _report(client: Any, rank: int, status: dict[str, str]) -> None:
    """Set vLLM's own status of a rank (`--enable-fault-tolerance`, /fault_tolerance/status; vLLM 0.27 and later)."""
    if getattr(client.vllm_config.parallel_config, "enable_fault_tolerance", False):
        client._engine_status[rank] = {"id": rank, **status}


def _engine(rank: int) -> Engine:
    return rank.to_bytes(2, "little")


def _rank(engine: Engine) -> int:
    return int.from_bytes(engine, "little")
