"""Each call of the workers gets its own answers, also after a call that failed."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2


class AnsweringExecutor(RayExecutorV2):
    """vLLM's executor, whose next call does not take the answers that a failed one left behind.

    vLLM 0.23 to 0.33 read the ranks' answers in turn and stop at the first error or at a time-out. The others' answers
    stay in their queues, and every later call gets the answer to the one before: wrong results, or the engine's end.
    """

    _asked: Counter[int] | None = None
    _read: Counter[int]

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream's."""
        if self._asked is None:
            self._asked, self._read = Counter(), Counter()
        return super().collective_rpc.__func__(_Call(self), *args, **kwargs)

    def asked(self, rank: int) -> int:
        """Note that ``rank`` owes an answer; the answer's number."""
        assert self._asked is not None
        self._asked[rank] += 1
        return self._asked[rank]

    def answer(self, queue: Any, rank: int, number: int, timeout: float | None) -> Any:
        """The answer with that number, within ``timeout`` seconds. Those before it belong to calls that have ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            found = queue.dequeue(timeout=left)
            self._read[rank] += 1
            if self._read[rank] == number:
                return found


class _Call:
    """The executor as one call sees it: a queue for the question, and of each rank's answers the one to it."""

    def __init__(self, executor: AnsweringExecutor) -> None:
        self._executor = executor
        self._numbers: dict[int, int] = {}
        self.rpc_broadcast_mq = executor.rpc_broadcast_mq and self
        self.response_mqs = [
            _Reader(executor, self._numbers, rank, queue) for rank, queue in enumerate(executor.response_mqs)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def enqueue(self, question: tuple[Any, ...]) -> None:
        """Send it. Only then is an answer owed: a question that cannot be pickled was never asked."""
        self._executor.rpc_broadcast_mq.enqueue(question)
        only = question[-1]
        ranks = range(len(self.response_mqs)) if only is None else (only,)
        self._numbers.update((rank, self._executor.asked(rank)) for rank in ranks)


class _Reader:
    """A rank's answer to one call."""

    def __init__(self, executor: AnsweringExecutor, numbers: dict[int, int], rank: int, queue: Any) -> None:
        self._executor, self._numbers, self._rank, self._queue = executor, numbers, rank, queue

    def dequeue(self, timeout: float | None = None) -> Any:
        return self._executor.answer(self._queue, self._rank, self._numbers[self._rank], timeout)
