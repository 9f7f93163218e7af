"""The communicator of one sender (rank 0) and one receiver (rank 1), whose creation can be given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.hccl.communicator import Group, Transfer

if TYPE_CHECKING:
    import torch

SENDER, RECEIVER = 0, 1
Allocate = Callable[[], "list[torch.Tensor]"]
"""Returns the tensors that an object is received into."""
_POLL_S = 0.05


class PairCommunicator:
    """One end. Objects are transferred one at a time, each as its tensors one after the other.

    No stream of torch's waits for a peer: threads share the default one, so of two processes that send to each other
    each would have its receive wait behind its send. Nor does a transfer wait for what the actor computes meanwhile.
    """

    def __init__(self, group: Group, rank: int) -> None:
        self._group = group
        self._peer = 1 - rank
        self._npu = get_accelerator("npu")

    def send(self, tensors: list[torch.Tensor]) -> Transfer:
        """Send computed tensors. Returns immediately; wait for the transfer before they are changed."""
        self._npu.bind_thread(self._group.device)
        with self._npu.fast_stream_context(_idle_stream(self._group.device)):
            return _last([self._group.send(tensor, self._peer, caller_waits=False) for tensor in tensors])

    def receive(self, allocate: Allocate) -> tuple[list[torch.Tensor], Transfer]:
        """Receive into the tensors that ``allocate`` returns.

        Returns immediately; when the transfer has been waited for, any stream may use the tensors.
        """
        self._npu.bind_thread(self._group.device)
        caller = self._npu.current_stream()
        with self._npu.fast_stream_context(_idle_stream(self._group.device)):
            tensors = allocate()
            transfer = _last([self._group.recv(tensor, self._peer) for tensor in tensors])
        for tensor in tensors:
            tensor.record_stream(caller)
        return tensors, transfer

    def abort(self, reason: str) -> None:
        """End the communicator, from any thread; waits in it raise, here and at the peer."""
        self._group.abort(reason)


def _last(transfers: Sequence[Transfer]) -> Transfer:
    """Return the transfer that ends last: they are in one stream, but those of empty tensors, which end at once."""
    return next((each for each in reversed(transfers) if each.event is not None), transfers[-1])


@cache
def _idle_stream(device: int) -> Any:
    """Return a stream that only allocates tensors: no transfer has to wait for it."""
    return get_accelerator("npu").create_stream()


class PairConnector:
    """Connects a pair in a thread of its own: HCCL waits for HCCL_CONNECT_TIMEOUT and 20 s, also for the dead."""

    def __init__(self, device: int, rank: int, root_info: bytes, limit_s: float) -> None:
        self._arguments = (device, rank, 2, root_info, limit_s)
        self._rank = rank
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._group: Group | None = None
        """Connected once ``_ready`` is set without ``_error``."""
        self._error: Exception | None = None
        self._abandon_reason = ""
        threading.Thread(target=self._connect, daemon=True, name="RayAscendDirectConnect").start()

    def wait_connected(self, deadline: float, check: Callable[[], None]) -> PairCommunicator:
        """Return the connected pair. Raises what ``check``, called meanwhile, raises; TimeoutError at ``deadline``."""
        try:
            while not self._ready.wait(_POLL_S):
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError
        except Exception as error:  # whatever `check` raises: the pair must not stay connected
            self._abandon(str(error))
            raise
        if self._error is not None:
            raise self._error
        assert self._group is not None
        return PairCommunicator(self._group, self._rank)

    def _connect(self) -> None:
        try:
            self._meet_peer().connect(("send",))
        except Exception as error:  # noqa: BLE001  whatever it is, `wait_connected` raises it in the thread that needs the pair
            self._error = error
        self._ready.set()

    def _meet_peer(self) -> Group:
        """Return the group, whose link set-up `_abandon` ends."""
        group = Group(*self._arguments)
        with self._lock:
            self._group, abandon_reason = group, self._abandon_reason
        if abandon_reason:
            group.abort(abandon_reason)
        return group

    def _abandon(self, reason: str) -> None:
        with self._lock:
            self._abandon_reason, group = reason or "nobody waited any longer", self._group
        if group is not None:
            group.abort(reason)
