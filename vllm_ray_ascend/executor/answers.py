"""Each call of the workers gets its own answers, also after a call that failed."""

from __future__ import annotations

import pickle
import time
import uuid
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2


class AnsweringExecutor(RayExecutorV2):
    """vLLM's executor, whose next call does not take the answers that a failed one left behind.

    vLLM 0.23 to 0.33 read the ranks' answers in turn and stop at the first error or at a time-out. The others' answers
    stay in their queues, and every later call gets the answer to the one before: wrong results, or the engine's end.
    Calls that are not waited for are an engine's steps, of which none comes after one that failed.
    """

    _left_behind = False

    def collective_rpc(self, method: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        """As upstream's."""
        if self._left_behind:
            self._skip_answers(timeout)
        try:
            return super().collective_rpc(method, timeout, *args, **kwargs)
        except Exception:
            self._left_behind = True
            raise

    def _skip_answers(self, timeout: float | None) -> None:
        """Have every rank repeat a word that nobody else says, and read on until it comes. Raises TimeoutError."""
        word = uuid.uuid4().hex
        deadline = None if timeout is None else time.monotonic() + timeout
        self.rpc_broadcast_mq.enqueue((pickle.dumps(_repeat), (word,), {}, None))
        for queue in self.response_mqs:
            answer: Any = None
            while not (isinstance(answer, str) and answer == word):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                _, answer = queue.dequeue(timeout=left)
        self._left_behind = False


def _repeat(_: Any, word: str) -> str:
    """Called in a worker."""
    return word
