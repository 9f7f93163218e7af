"""Calls of workers over vLLM's own message queues: each gets its own responses, and a step is one message."""

from __future__ import annotations

import functools
import pickle
import threading
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from vllm_ray_ascend.errors import WorkerLateError
from vllm_ray_ascend.executor import worker as worker_module
from vllm_ray_ascend.executor.executor import RayAscendExecutor
from vllm_ray_ascend.executor.startup import StartupRayProxy
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.executor.worker import phase_reporting_wrapper
from vllm_ray_ascend.executor.worker_calls import is_sampled_at_once
from vllm_ray_ascend.settings import Settings

Status = WorkerProc.ResponseStatus
RANKS = 2

_kept_alive: list[object] = []
"""Queues of tests that are over: ZeroMQ's contexts block where they are collected with sockets that are still open."""


class Workers:
    """Two threads that respond as vLLM's workers do. A call's name says which rank fails, or waits for its release."""

    def __init__(self) -> None:
        self.requests = MessageQueue(RANKS, RANKS)
        self.responses = [MessageQueue(1, 1) for _ in range(RANKS)]
        self.released = threading.Event()
        self.late = ""
        """What the ranks answer only when they are released."""
        self.called: list[tuple[str, int]] = []
        """Name and number of arguments of each call that the last rank was sent."""
        self.threads = [threading.Thread(target=self.work, args=(rank,), daemon=True) for rank in range(RANKS)]

    def work(self, rank: int) -> None:
        requests = MessageQueue.create_from_handle(self.requests.export_handle(), rank)
        _kept_alive.append(requests)
        while True:
            method, args, _, only = requests.dequeue()
            name = method if isinstance(method, str) else ""
            if rank == RANKS - 1:
                self.called.append((name, len(args)))
            if name == f"late {rank}" or (name and name == self.late):
                self.released.wait(30)
            if only in (None, rank):
                failed = name == f"fail {rank}"
                response = (rank, *args) if name else pickle.loads(method)(self, *args)
                self.responses[rank].enqueue((Status.FAILURE if failed else Status.SUCCESS, response))
            if name == "end":
                return


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers()
    _kept_alive.append(found)
    for thread in found.threads:
        thread.start()
    yield found
    found.released.set()
    found.requests.enqueue(("end", (), {}, None))
    for thread in found.threads:
        thread.join(30)


def config() -> Any:
    """Return what decides whether steps are merged."""
    generates = SimpleNamespace(runner_type="generate")
    return SimpleNamespace(model_config=generates, ec_transfer_config=None, is_mm_encoder_only=False)


def create_executor(workers: Workers) -> Any:
    """Return our executor with nothing but what calls of these workers need."""
    found: Any = RayAscendExecutor.__new__(RayAscendExecutor)
    found.vllm_config, found.output_rank = config(), 1
    found.kv_output_aggregator = found.ec_output_aggregator = found.lora_config = None
    found._supervisor, found._recovery = WorkerSupervisor(list, Settings(), 240.0), None
    found._startup, found._hang_s = StartupRayProxy(found._supervisor, Settings()), 30.0
    found.is_failed, found.futures_queue, found.rpc_broadcast_mq = False, deque(), workers.requests
    found.response_mqs = [MessageQueue.create_from_handle(queue.export_handle(), 0) for queue in workers.responses]
    _kept_alive.append(found)
    return found


@pytest.fixture
def executor(workers: Workers) -> Any:
    return create_executor(workers)


def check_call(executor: Any, number: int) -> None:
    assert executor.collective_rpc("ask", 10, args=(number,)) == [(0, number), (1, number)]


@pytest.mark.parametrize("rank", range(RANKS))
def test_after_an_error(executor: Any, rank: int) -> None:
    check_call(executor, 1)
    for number in (2, 3):
        with pytest.raises(RuntimeError, match="Worker failed"):
            executor.collective_rpc(f"fail {rank}", args=(number,))
    check_call(executor, 4)
    assert executor.collective_rpc("ask", args=(5,), unique_reply_rank=1) == (1, 5)
    check_call(executor, 6)


@pytest.mark.parametrize("rank", range(RANKS))
def test_after_a_time_out(executor: Any, workers: Workers, rank: int) -> None:
    with pytest.raises(TimeoutError):
        executor.collective_rpc(f"late {rank}", 0.1, args=(1,))
    workers.released.set()
    check_call(executor, 2)


def test_a_time_out_while_a_rank_is_still_late(executor: Any, workers: Workers) -> None:
    for _ in range(2):
        with pytest.raises(TimeoutError):
            executor.collective_rpc("late 0", 0.1, args=(1,))
    workers.released.set()
    check_call(executor, 2)


def test_calls_under_way_when_one_is_waited_for(executor: Any) -> None:
    calls = [
        executor.collective_rpc("ask", args=(number,), unique_reply_rank=only, non_block=True)
        for number, only in enumerate([1, None])
    ]
    with pytest.raises(RuntimeError, match="Worker failed"):
        executor.collective_rpc("fail 0")
    check_call(executor, 2)
    assert [call.result() for call in calls] == [(1, 0), [(0, 1), (1, 1)]]


def test_a_call_that_cannot_be_sent_has_no_response(executor: Any) -> None:
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        executor.collective_rpc("ask", args=(threading.Lock(),))
    check_call(executor, 1)


MERGED = ("execute_model_and_sample_tokens", 2)


def scheduled(tokens: int = 1, grammar: bool = False) -> SchedulerOutput:
    found = SchedulerOutput.make_empty()
    found.total_num_scheduled_tokens, found.has_structured_output_requests = tokens, grammar
    return found


def run_step(executor: Any, **step: Any) -> Any:
    """Make a step as vLLM's engine core does."""
    executed = executor.execute_model(scheduled(**step), non_block=True)
    return executor.sample_tokens(None, non_block=True), executed


def test_a_step_is_one_message_and_one_response(executor: Any, workers: Workers) -> None:
    steps = [run_step(executor) for _ in range(3)]
    for sampled, executed in steps:
        rank, output, grammar = sampled.result()
        assert (rank, output.total_num_scheduled_tokens, grammar) == (1, 1, None) and executed.result() is None
    assert workers.called == [MERGED] * 3 and not executor.futures_queue
    check_call(executor, 4)


def test_a_step_that_is_waited_for(executor: Any, workers: Workers) -> None:
    """As without asynchronous scheduling: the engine core waits for the first call before it makes the second."""
    assert executor.execute_model(scheduled(), non_block=True).result() is None
    assert executor.sample_tokens(None)[0] == 1
    assert workers.called == [MERGED]


def test_a_step_with_a_grammar_is_computed_while_the_grammar_is(executor: Any, workers: Workers) -> None:
    sampled, executed = run_step(executor, grammar=True)
    assert (executed.result()[0], sampled.result()) == (1, (1, None))
    assert workers.called == [("execute_model", 1), ("sample_tokens", 1)]


@pytest.mark.parametrize("call", ["ask", "execute_model"])
def test_a_call_within_a_step_comes_after_what_was_asked_before(executor: Any, workers: Workers, call: str) -> None:
    executor.execute_model(scheduled(), non_block=True)
    executor.collective_rpc(call, args=(scheduled(),), unique_reply_rank=1)
    assert executor.sample_tokens(None) == (1, None)
    assert workers.called == [("execute_model", 1), (call, 1), ("sample_tokens", 1)]
    check_call(executor, 3)


def test_only_a_step_that_is_sampled_at_once_is_held() -> None:
    assert is_sampled_at_once(scheduled())
    assert not is_sampled_at_once(scheduled(tokens=0)) and not is_sampled_at_once(scheduled(grammar=True))


@pytest.mark.parametrize(
    "other",
    [
        {"model_config": SimpleNamespace(runner_type="pooling")},
        {"ec_transfer_config": ()},
        {"is_mm_encoder_only": True},
    ],
)
def test_an_engine_that_does_not_sample_each_step_merges_none(
    executor: Any, workers: Workers, other: dict[str, Any]
) -> None:
    executor.vllm_config.__dict__.update(other)
    assert run_step(executor)[1].result()[0] == 1
    assert workers.called[0] == ("execute_model", 1)


@pytest.mark.parametrize("name", ["execute_model", "sample_tokens", "collective_rpc"])
@pytest.mark.parametrize("owner", [RayAscendExecutor, MultiprocExecutor, None])
def test_somebody_who_watches_the_calls_of_a_step_sees_both(
    executor: Any, workers: Workers, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """As a profiler or a framework that has wrapped one of them, before or after us, or of one executor alone."""
    owner = owner or executor
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    assert run_step(executor)[0].result() == (1, None)
    assert workers.called == [("execute_model", 1), ("sample_tokens", 1)]


def test_a_step_that_is_late_raises_the_error_that_says_so(executor: Any, workers: Workers) -> None:
    workers.late = "execute_model_and_sample_tokens"
    executor._hang_s = 0.1
    sampled, _ = run_step(executor)
    with pytest.raises(WorkerLateError, match=r"VRA-309: execute_model_and_sample_tokens has not ended after 0\.1 s"):
        sampled.result()


def test_a_step_that_is_to_be_over_is_not_held(executor: Any, workers: Workers) -> None:
    assert executor.execute_model(scheduled())[0] == 1
    assert workers.called == [("execute_model", 1)]


@pytest.mark.parametrize(
    ("output", "is_last", "result", "calls"),
    [
        (None, True, "tokens", ["execute_model", "sample_tokens"]),
        (None, False, "tokens", ["execute_model", "sample_tokens"]),
        ("of the connector", False, "tokens", ["execute_model", "sample_tokens"]),
        ("tokens at once", True, "tokens at once", ["execute_model"]),
    ],
)
def test_a_worker_runs_both_methods_as_the_engine_core_would_call_them(
    monkeypatch: pytest.MonkeyPatch, output: Any, is_last: bool, result: str, calls: list[str]
) -> None:
    found: list[str] = []

    class Worker:
        def execute_model(self, _: Any) -> Any:
            found.append("execute_model")
            return output

        def sample_tokens(self, _: Any) -> str:
            found.append("sample_tokens")
            return "tokens"

    wrapper: Any = phase_reporting_wrapper(lambda _: None)(0)
    wrapper.worker, wrapper.mm_receiver_cache = Worker(), None
    monkeypatch.setattr(worker_module, "get_pp_group", lambda: SimpleNamespace(is_last_rank=is_last))
    assert wrapper.execute_model_and_sample_tokens(scheduled(), None) == result
    assert found == calls
