"""Calls of workers over vLLM's own message queues: each gets its own answers, whatever became of the one before."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc

from vllm_ray_ascend.executor.answers import AnsweringExecutor

Status = WorkerProc.ResponseStatus
RANKS = 2

_kept: list[object] = []
"""Queues of tests that are over: ZeroMQ's contexts block where they are collected with sockets that are still open."""


class Workers:
    """Two threads that answer as vLLM's workers do. A call's name says who fails, or who waits to be let go."""

    def __init__(self) -> None:
        self.questions = MessageQueue(RANKS, RANKS)
        self.answers = [MessageQueue(1, 1) for _ in range(RANKS)]
        self.let_go = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(rank,), daemon=True) for rank in range(RANKS)]

    def work(self, rank: int) -> None:
        questions = MessageQueue.create_from_handle(self.questions.export_handle(), rank)
        _kept.append(questions)
        while True:
            asked, args, _, only = questions.dequeue()
            name = asked if isinstance(asked, str) else ""
            if name == f"late {rank}":
                self.let_go.wait(30)
            if only in (None, rank):
                failed = name == f"fail {rank}"
                answer = (rank, *args) if name else pickle.loads(asked)(self, *args)
                self.answers[rank].enqueue((Status.FAILURE if failed else Status.SUCCESS, answer))
            if name == "end":
                return


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers()
    _kept.append(found)
    for thread in found.threads:
        thread.start()
    yield found
    found.let_go.set()
    found.questions.enqueue(("end", (), {}, None))
    for thread in found.threads:
        thread.join(30)


@pytest.fixture
def executor(workers: Workers) -> Any:
    found: Any = AnsweringExecutor.__new__(AnsweringExecutor)
    found.is_failed, found.futures_queue, found.rpc_broadcast_mq = False, deque(), workers.questions
    found.response_mqs = [MessageQueue.create_from_handle(queue.export_handle(), 0) for queue in workers.answers]
    _kept.append(found)
    return found


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
    workers.let_go.set()
    check_call(executor, 2)


def test_a_time_out_while_a_rank_is_still_late(executor: Any, workers: Workers) -> None:
    for _ in range(2):
        with pytest.raises(TimeoutError):
            executor.collective_rpc("late 0", 0.1, args=(1,))
    workers.let_go.set()
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


def test_a_question_that_cannot_be_asked_has_no_answer(executor: Any) -> None:
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        executor.collective_rpc("ask", args=(threading.Lock(),))
    check_call(executor, 1)
