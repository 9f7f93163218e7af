"""The communicator of one sender (rank 0) and one receiver (rank 1), made without waiting for a peer that is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.transport.hccl.group import Group
from vllm_ray_ascend.transport.hccl.transfer import Transfer

if TYPE_CHECKING:
    import torch

SENDER, RECEIVER = 0, 1
Make = Callable[[], "list[torch.Tensor]"]
_LOOK_S = 0.05


class Pair:
    """One end. Objects go one at a time, each as its tensors one after the other.

    No stream of torch's waits for a peer: threads share the default one, so of two processes that send to each other
    each would have its receive wait behind its send. Nor does a transfer wait for what the actor computes meanwhile.
    """

    def __init__(self, group: Group, rank: int) -> None:
        self._group = group
        self._peer = 1 - rank
        self._npu = accelerator("npu")

    def send(self, tensors: list[torch.Tensor]) -> Transfer:
        """Send what has been written. Returns at once; wait for what it returns."""
        self._npu.bind_thread(self._group.device)
        with self._npu.in_stream(_aside(self._group.device)):
            return [self._group.send(tensor, self._peer, caller_waits=False) for tensor in tensors][-1]

    def receive(self, make: Make) -> tuple[list[torch.Tensor], Transfer]:
        """Receive into the tensors that ``make`` makes in the present stream.

        Returns at once; when the transfer has been waited for, any stream may use the tensors.
        """
        self._npu.bind_thread(self._group.device)
        caller = self._npu.current_stream()
        with self._npu.in_stream(_aside(self._group.device)):
            tensors = make()
            transfer = [self._group.recv(tensor, self._peer) for tensor in tensors][-1]
        for tensor in tensors:
            tensor.record_stream(caller)
        return tensors, transfer

    def end(self, why: str) -> None:
        """Destroy the communicator; what waits in it raises, here and at the peer. May be called in any thread."""
        self._group.abort(why)


@cache
def _aside(device: int) -> Any:
    """A stream that only makes tensors: no transfer has to wait for it."""
    return accelerator("npu").new_stream()


class Connecting:
    """A pair in the making, in a thread of its own: HCCL waits up to HCCL_CONNECT_TIMEOUT for a peer that is gone."""

    def __init__(self, device: int, rank: int, root: bytes, limit_s: float) -> None:
        self._arguments = (device, rank, 2, root, limit_s)
        self._rank = rank
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._group: Group | None = None
        self._error: Exception | None = None
        self._left = ""
        threading.Thread(target=self._make, daemon=True, name="RayAscendDirectConnect").start()

    def result(self, deadline: float, check: Callable[[], None]) -> Pair:
        """The pair. ``check`` is called while it waits, and may raise; so does this, TimeoutError, at ``deadline``."""
        try:
            while not self._ready.wait(_LOOK_S):
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError
        except Exception as error:
            self._leave(str(error))
            raise
        if self._error is not None:
            raise self._error
        assert self._group is not None
        return Pair(self._group, self._rank)

    def _make(self) -> None:
        try:
            group = Group(*self._arguments)
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            self._error = error
        else:
            with self._lock:
                self._group, left = group, self._left
            if left:
                group.abort(left)
        self._ready.set()

    def _leave(self, why: str) -> None:
        with self._lock:
            self._left, group = why or "nobody waited any longer", self._group
        if group is not None:
            group.abort(why)
