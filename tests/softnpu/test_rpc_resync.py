"""Calls of workers over vLLM's own message queues: each gets its own responses, even after a call that failed."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc

from vllm_ray_ascend.executor.executor import RpcResyncExecutor

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
        self.threads = [threading.Thread(target=self.work, args=(rank,), daemon=True) for rank in range(RANKS)]

    def work(self, rank: int) -> None:
        requests = MessageQueue.create_from_handle(self.requests.export_handle(), rank)
        _kept_alive.append(requests)
        while True:
            method, args, _, only = requests.dequeue()
            name = method if isinstance(method, str) else ""
            if name == f"late {rank}":
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


@pytest.fixture
def executor(workers: Workers) -> Any:
    found: Any = RpcResyncExecutor.__new__(RpcResyncExecutor)
    found.is_failed, found.futures_queue, found.rpc_broadcast_mq = False, deque(), workers.requests
    found.response_mqs = [MessageQueue.create_from_handle(queue.export_handle(), 0) for queue in workers.responses]
    _kept_alive.append(found)
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
