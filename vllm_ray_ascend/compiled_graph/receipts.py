"""Between nodes nobody sends before what was sent last is read.

A channel between nodes has room for one message, and the raylet of the reader's node waits, and does nothing else,
until that is read (ray-project/ray#49044): for ever where the reader is dead, and the node is lost to Ray. So each
worker tells the executor that it has read, by the connection on which that watches it (lifecycle/), and the executor
tells the sender.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

from vllm_ray_ascend.compiled_graph.shape import Shape


class Receipts:
    """Of what one process sends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owing = 0
        self._cause: BaseException | None = None

    def before_sending(self, readers: int, limit_s: float | None = None) -> bool:
        """Wait until all is read, then expect as many receipts as there are ``readers``; False where that took more
        than ``limit_s`` seconds. Raises what `close` was given."""
        with self._changed:
            read = self._changed.wait_for(lambda: self._cause is not None or not self._owing, limit_s)
            if self._cause is not None:
                raise self._cause
            if read:
                self._owing = readers
            return read

    def came(self) -> None:
        """A reader has read."""
        with self._changed:
            self._owing -= 1
            self._changed.notify_all()

    def close(self, cause: BaseException) -> None:
        """End a wait that is under way and all later ones with ``cause``. May be called in any thread."""
        with self._changed:
            self._cause = self._cause or cause
            self._changed.notify_all()


class Post:
    """The executor's part: knows who reads what whom sends."""

    def __init__(self, shape: Shape, send: Callable[[int], None]) -> None:
        """``send``: tells a rank that what it sent last was read."""
        self.own = Receipts()
        self.first = len(shape.stages[0])
        self._send = send
        self._last = shape.stages[-1]
        self._sender = {reader: sender for each in shape.pipelines() for sender, reader in pairwise(each)}

    def read_by(self, rank: int) -> None:
        """A rank has read its message, the first stage's that of the executor."""
        sender = self._sender.get(rank)
        if sender is None:
            self.own.came()
        else:
            self._send(sender)

    def answers_read(self) -> None:
        """The executor has read what all ranks of the last stage answered."""
        for rank in self._last:
            self._send(rank)
