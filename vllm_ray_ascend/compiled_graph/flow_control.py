"""Flow control between nodes: no process sends before what it sent last is read.

A channel between nodes has room for one message, and the raylet of the reader's node waits, and does nothing else,
until that is read (ray-project/ray#49044): for ever where the reader is dead, and the node is lost to Ray. So each
worker acknowledges to the executor what it has read, on its control connection, and the executor acknowledges it to the
sender.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

from vllm_ray_ascend.compiled_graph.layout import PipelineLayout

ACK = "ack"
"""The Extension message of the control connection that acknowledges. From a worker: it has read the message of a step
and all that belongs to it. From the executor: what this worker sent last was read."""


class AckTracker:
    """Acknowledgements of what one process sends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending = 0
        self._cause: BaseException | None = None

    def wait_for_acks(self, readers: int, limit_s: float | None = None) -> bool:
        """Wait until all readers have acknowledged, then expect one acknowledgement of each of ``readers``.

        Return False, and expect nothing new, where that takes more than ``limit_s`` seconds. Raises what `close` was
        given.
        """
        with self._changed:
            acknowledged = self._changed.wait_for(lambda: self._cause is not None or not self._pending, limit_s)
            if self._cause is not None:
                raise self._cause
            if acknowledged:
                self._pending = readers
            return acknowledged

    def on_ack(self) -> None:
        """Count the acknowledgement of one reader."""
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()

    def close(self, cause: BaseException) -> None:
        """End a wait in progress and all later ones with ``cause``. May be called in any thread."""
        with self._changed:
            self._cause = self._cause or cause
            self._changed.notify_all()


class AckRouter:
    """The executor's part: it passes each acknowledgement on to the sender of what was read."""

    def __init__(self, layout: PipelineLayout, send_ack: Callable[[int], None]) -> None:
        """``send_ack(rank)`` acknowledges to a rank what it sent last."""
        self.own_acks = AckTracker()
        """Of what the executor itself sends."""
        self.first_stage_size = len(layout.stages[0])
        self._send_ack = send_ack
        self._last_stage = layout.stages[-1]
        self._senders = {reader: sender for each in layout.pipelines() for sender, reader in pairwise(each)}

    def on_ack(self, rank: int) -> None:
        """Pass on that ``rank`` has read its message; the first stage's comes from the executor."""
        sender = self._senders.get(rank)
        if sender is None:
            self.own_acks.on_ack()
        else:
            self._send_ack(sender)

    def ack_responses(self) -> None:
        """Acknowledge to all ranks of the last stage that the executor has read their responses."""
        for rank in self._last_stage:
            self._send_ack(rank)
