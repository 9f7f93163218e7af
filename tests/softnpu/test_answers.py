"""Calls of workers over vLLM's own message queues: each gets its own answers, whatever became of the one before."""

from __future__ import annotations

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
            name, args, _, only = questions.dequeue()
            if name == f"late {rank}":
                self.let_go.wait(30)
            if only in (None, rank):
                failed = name == f"fail {rank}"
                self.answers[rank].enqueue((Status.FAILURE if failed else Status.SUCCESS, (rank, *args)))
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


def test_several_calls_under_way(executor: Any) -> None:
    calls = [
        executor.collective_rpc(name, args=(number,), unique_reply_rank=only, non_block=True)
        for number, (name, only) in enumerate([("ask", 1), ("fail 0", None), ("ask", 0), ("ask", None)])
    ]
    assert calls[3].result(), "the last first: it reads the others' answers before its own"
    assert [call.result() for call in (calls[0], calls[2], calls[3])] == [(1, 0), (0, 2), [(0, 3), (1, 3)]]
    with pytest.raises(RuntimeError, match="Worker failed"):
        calls[1].result()


def test_a_question_that_cannot_be_asked_has_no_answer(executor: Any) -> None:
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        executor.collective_rpc("ask", args=(threading.Lock(),))
    check_call(executor, 1)
