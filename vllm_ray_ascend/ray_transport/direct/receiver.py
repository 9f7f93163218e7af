"""The receiving end: a link to every process whose objects are received here, created with the first and used again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.ipc.authentication import connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ray_transport.direct.connection import Connection, ConnectionLostError
from vllm_ray_ascend.ray_transport.direct.local_endpoint import LocalEndpoint
from vllm_ray_ascend.ray_transport.direct.pair_communicator import RECEIVER, Allocate, PairCommunicator, PairConnector
from vllm_ray_ascend.ray_transport.direct.protocol import (
    Failed,
    FetchRequest,
    Hello,
    Message,
    Refused,
    SendReady,
    Welcome,
)

if TYPE_CHECKING:
    import torch

M = TypeVar("M", bound=Message)
_LOST_WAIT_S = 0.5
"""How long the connection may take to report the sender's end, where HCCL was quicker and does not know the reason."""
_LONGER_LIMIT = (
    "If it only needs longer, raise VLLM_RAY_ASCEND_TRANSFER_LIMIT_S and "
    "RAY_rdt_fetch_fail_timeout_milliseconds, for all actors and their driver."
)
_PRODUCE_AGAIN = "Produce the object again; an actor is restarted only with `max_restarts`."


class Origin(NamedTuple):
    """Where an object is: its process, and the visible index of the NPU there."""

    address: Address
    device: int


class Receiver:
    """Receives objects. A link that has failed is replaced by the next receive."""

    def __init__(self, local_endpoint: LocalEndpoint) -> None:
        self._endpoint = local_endpoint
        self._lock = threading.Lock()
        self._links: dict[tuple[Origin, int], _ReceiverLink] = {}
        self._link_locks: defaultdict[tuple[Origin, int], threading.Lock] = defaultdict(threading.Lock)
        self._active: dict[str, _ReceiverLink | None] = {}
        self._aborted: dict[str, str] = {}

    def receive_object(self, object_id: str, origin: Origin, device: int, allocate: Allocate) -> list[torch.Tensor]:
        """Return the object's tensors on ``device``: those that ``allocate`` returns, filled.

        Raises DirectTransportError with the reason and the remedy.
        """
        deadline = time.monotonic() + self._endpoint.limit_s
        key = (origin, device)
        with self._exclusive_link(key, deadline):
            try:
                link = self._links.get(key)
                if link is not None and link.is_usable:
                    with contextlib.suppress(_NotStartedError):
                        return self._receive_over(link, object_id, allocate, deadline)
                link = self._links[key] = _ReceiverLink(self._endpoint, *key)
                return self._receive_over(link, object_id, allocate, deadline)
            finally:
                with self._lock:
                    self._active.pop(object_id, None)
                    self._aborted.pop(object_id, None)

    def abort(self, object_id: str, reason: str) -> None:
        """End the transfer of an object, also before it starts; its sender is released as well."""
        with self._lock:
            self._aborted[object_id] = reason
            link = self._active.get(object_id)
        if link is not None:
            link.close_link(reason)

    def release(self) -> None:
        """Destroy all communicators; the next object creates new ones."""
        for link in list(self._links.values()):
            link.close_link("the receiver released its communicators")

    def _receive_over(
        self, link: _ReceiverLink, object_id: str, allocate: Allocate, deadline: float
    ) -> list[torch.Tensor]:
        with self._lock:
            abort_reason = self._aborted.get(object_id)
            self._active[object_id] = link
        if abort_reason:
            raise DirectTransportError("VRA-531", f"Object {object_id[:16]} was not received: {abort_reason}")
        return link.receive_object(object_id, allocate, deadline)

    @contextlib.contextmanager
    def _exclusive_link(self, key: tuple[Origin, int], deadline: float) -> Iterator[None]:
        """Receive one object at a time from each sender."""
        with self._lock:
            link_lock = self._link_locks[key]
        if not link_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DirectTransportError(
                "VRA-532",
                f"An earlier object from {key[0].address.host} was still being transferred after "
                f"{self._endpoint.limit_s:g} s. {_LONGER_LIMIT}",
            )
        try:
            yield
        finally:
            link_lock.release()


class _NotStartedError(Exception):
    """The link had ended before the object was requested: a new link is needed."""


class _RefusedError(Exception):
    """The sender does not have the object, or cannot send it; the link stays usable."""


class _ReceiverLink:
    """The receiving end of one link."""

    def __init__(self, local_endpoint: LocalEndpoint, origin: Origin, device: int) -> None:
        self._endpoint = local_endpoint
        self._origin = origin
        self._device = device
        self._sender = f"the process at {origin.address}"
        self._phase = ""
        self._phase_started_at = time.monotonic()
        self._connection: Connection | None = None
        self._pair: PairCommunicator | None = None
        self._held_tensors: list[torch.Tensor] = []
        self._close_reason = ""
        self._lock = threading.Lock()

    @property
    def is_usable(self) -> bool:
        """Whether another object can be received over it."""
        return not self._close_reason and self._connection is not None and not self._connection.lost_reason

    def receive_object(self, object_id: str, allocate: Allocate, deadline: float) -> list[torch.Tensor]:
        """Receive as `Receiver.receive_object` does. Raises _NotStartedError too, where a link of before had ended."""
        reused = self._pair is not None
        try:
            pair = self._pair or self._connect_pair(deadline)
            self._request(FetchRequest(object_id), SendReady, deadline, "its producer was computing")
            self._start_phase("it was being transferred")
            reused = False
            with self._endpoint.outside_captures("receiving the tensors of an object", self._raise_if_unusable):
                # Held until HCCL no longer writes to them, which may be the end of the communicator.
                self._held_tensors, transfer = pair.receive(allocate)
            transfer.wait(_remaining_s(deadline))
            tensors, self._held_tensors = self._held_tensors, []
            return tensors
        except _RefusedError as error:
            raise DirectTransportError("VRA-533", f"Object {object_id[:16]} was not received: {error}") from None
        except Exception as error:  # whatever it is, it is raised again, with its reason
            if reused and isinstance(error, ConnectionLostError) and not self._close_reason:
                self.close_link("the link was used after its end")
                raise _NotStartedError from None
            code, reason = self._explain_failure(error)
            self.close_link(f"{self._endpoint.process} gave up: {reason}")
            raise DirectTransportError(code, f"Object {object_id[:16]} was not received: {reason}") from error

    def close_link(self, reason: str) -> None:
        """End the link, a transfer in progress, and the communicator; from any thread."""
        with self._lock:
            if self._close_reason:
                return
            self._close_reason = reason
        if self._connection is not None:
            with contextlib.suppress(ConnectionLostError):
                self._connection.send(Failed(reason))
            self._connection.close()
        if self._pair is not None:
            self._pair.abort(reason)

    def _connect_pair(self, deadline: float) -> PairCommunicator:
        self._start_phase("the two processes connected")
        address = self._origin.address
        connection = connect_authenticated(address, _remaining_s(deadline))
        self._connection = Connection(connection, self._endpoint.settings.silence_s, self._on_lost)
        own_npu = self._endpoint.describe_npu(self._device)
        hello = Hello(self._origin.device, self._endpoint.process, own_npu)
        welcome = self._request(hello, Welcome, deadline, self._phase)
        self._sender = welcome.process
        connector = PairConnector(self._device, RECEIVER, welcome.root_info, self._endpoint.limit_s)
        pair = connector.wait_connected(deadline, self._raise_if_unusable)
        with self._lock:
            self._pair = pair
        self._raise_if_unusable()
        return pair

    def _request(self, request: Message, reply_type: type[M], deadline: float, phase: str) -> M:
        """Send a request and return the reply to it; ``phase`` is what the sender does in between, for messages."""
        self._start_phase(phase)
        assert self._connection is not None
        self._connection.send(request)
        reply = self._connection.wait(_remaining_s(deadline))
        if isinstance(reply, Refused):
            raise _RefusedError(reply.text)
        if not isinstance(reply, reply_type):
            raise ConnectionLostError(f"it answered {type(reply).__name__} to {type(request).__name__}")
        return reply

    def _start_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase, self._phase_started_at = phase, time.monotonic()

    def _on_lost(self, reason: str) -> None:
        if self._pair is not None:
            self._pair.abort(f"{self._sender} is gone: {reason}")

    def _raise_if_unusable(self) -> None:
        if not self.is_usable:
            raise ConnectionLostError(self._close_reason or (self._connection.lost_reason if self._connection else ""))

    def _explain_failure(self, error: Exception) -> tuple[str, str]:
        """Return the code and the reason of a failed receive."""
        limit_s = self._endpoint.limit_s
        if self._close_reason:
            return "VRA-534", self._close_reason
        if isinstance(error, TimeoutError):
            silent_s = time.monotonic() - self._phase_started_at
            return "VRA-535", (
                f"{self._sender} was silent for {silent_s:.1f} s while {self._phase}, and the {limit_s:g} s of the "
                f"whole receive have passed. {_LONGER_LIMIT}"
            )
        if isinstance(error, ConnectionError | OSError) and self._connection is None:
            return "VRA-536", f"{self._sender} has ended ({error}). {_PRODUCE_AGAIN}"
        lost_reason = self._connection.wait_lost(_LOST_WAIT_S) if self._connection is not None else ""
        if self._connection is not None and self._connection.peer_reported:
            return "VRA-537", f"{self._sender} gave up while {self._phase}: {lost_reason}"
        if lost_reason or isinstance(error, ConnectionLostError):
            return "VRA-538", f"{self._sender} is gone, while {self._phase} ({lost_reason or error}). {_PRODUCE_AGAIN}"
        return "VRA-539", f"{error}"


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
