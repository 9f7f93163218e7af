"""Gates in streams: they make what is asynchronous come in the order that a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Gate:
    """Holds back what its stream is given after the gate, until the gate is opened."""

    def __init__(self, stream: torch.npu.Stream) -> None:
        self._opener = torch.npu.Stream()
        self._event = torch.npu.ExternalEvent()
        self._event.wait(stream)

    def open(self) -> None:
        self._event.record(self._opener)
        self._opener.synchronize()


@contextmanager
def gated(stream: torch.npu.Stream) -> Iterator[Gate]:
    """Yield a gate that is opened at the end in any case, so that a failed test leaves no stream waiting."""
    gate = Gate(stream)
    try:
        yield gate
    finally:
        gate.open()
