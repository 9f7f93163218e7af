"""The receiving end: a link to every process whose objects come here, made with the first of them and used again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.lifecycle.messages import Address
from vllm_ray_ascend.transport.direct.channel import Channel, ChannelLostError
from vllm_ray_ascend.transport.direct.messages import Coming, Failed, Hello, Message, Refused, Want, Welcome
from vllm_ray_ascend.transport.direct.pair import RECEIVER, Connecting, Make, Pair
from vllm_ray_ascend.transport.direct.place import Here

if TYPE_CHECKING:
    import torch

M = TypeVar("M", bound=Message)
_END_S = 0.5
"""For the connection to tell of the sender's end, where HCCL was quicker and does not know the reason."""
_LONGER = (
    "If it only needs longer, raise VLLM_RAY_ASCEND_TRANSFER_LIMIT_S and "
    "RAY_rdt_fetch_fail_timeout_milliseconds, for all actors and their driver."
)
_ANEW = "Produce the object anew; an actor comes back by itself only with `max_restarts`."


class Origin(NamedTuple):
    """Where an object is: its process, and the visible number of the NPU there."""

    address: Address
    device: int


class Sink:
    """Receives objects. A link that has failed is replaced by the next receive."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._lock = threading.Lock()
        self._links: dict[tuple[Origin, int], _Incoming] = {}
        self._turns: defaultdict[tuple[Origin, int], threading.Lock] = defaultdict(threading.Lock)
        self._coming: dict[str, _Incoming | None] = {}
        self._aborted: dict[str, str] = {}

    def receive(self, object_id: str, origin: Origin, device: int, make: Make) -> list[torch.Tensor]:
        """The object's tensors on ``device``: those that ``make`` makes, filled.

        Raises DirectTransportError with the reason and what mends it.
        """
        deadline = time.monotonic() + self._here.limit_s
        key = (origin, device)
        with self._turn(key, deadline):
            try:
                link = self._links.get(key)
                if link is not None and link.usable:
                    with contextlib.suppress(_NotBegunError):
                        return self._through(link, object_id, make, deadline)
                link = self._links[key] = _Incoming(self._here, *key)
                return self._through(link, object_id, make, deadline)
            finally:
                with self._lock:
                    self._coming.pop(object_id, None)
                    self._aborted.pop(object_id, None)

    def abort(self, object_id: str, why: str) -> None:
        """End the transfer of an object, also one that is yet to come; its sender is released as well."""
        with self._lock:
            self._aborted[object_id] = why
            link = self._coming.get(object_id)
        if link is not None:
            link.give_up(why)

    def release(self) -> None:
        """Destroy all communicators; the next object makes new ones."""
        for link in list(self._links.values()):
            link.give_up("the receiver released its communicators")

    def _through(self, link: _Incoming, object_id: str, make: Make, deadline: float) -> list[torch.Tensor]:
        with self._lock:
            aborted = self._aborted.get(object_id)
            self._coming[object_id] = link
        if aborted:
            raise DirectTransportError(f"Object {object_id[:16]} was not received: {aborted}")
        return link.receive(object_id, make, deadline)

    @contextlib.contextmanager
    def _turn(self, key: tuple[Origin, int], deadline: float) -> Iterator[None]:
        """One object at a time from each sender."""
        with self._lock:
            turn = self._turns[key]
        if not turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DirectTransportError(
                f"An earlier object from {key[0].address.host} was still on its way after {self._here.limit_s:g} s. "
                f"{_LONGER}"
            )
        try:
            yield
        finally:
            turn.release()


class _NotBegunError(Exception):
    """The link had ended before anything was sent: a new one does."""


class _RefusedError(Exception):
    """The sender does not have the object, or cannot send; nothing is wrong with the link."""


class _Incoming:
    """The receiving end of one link."""

    def __init__(self, here: Here, origin: Origin, device: int) -> None:
        self._here = here
        self._origin = origin
        self._device = device
        self._sender = f"the process at {origin.address.host}:{origin.address.port}"
        self._doing = ""
        self._channel: Channel | None = None
        self._pair: Pair | None = None
        self._held: list[torch.Tensor] = []
        self._given_up = ""
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        """Whether another object may come through it."""
        return not self._given_up and self._channel is not None and not self._channel.lost

    def receive(self, object_id: str, make: Make, deadline: float) -> list[torch.Tensor]:
        """As Sink.receive. Raises _NotBegunError too, where a link of before had ended."""
        again = self._pair is not None
        try:
            pair = self._pair or self._open(deadline)
            self._ask(Want(object_id), Coming, deadline, "its producer was at work")
            self._doing, again = "it was on its way", False
            with self._here.quiet("receiving tensors of a Ray object", self._check):
                # Held until HCCL no longer writes to them: at the end of the communicator, if it comes to that.
                self._held, transfer = pair.receive(make)
            transfer.wait(_left(deadline))
            tensors, self._held = self._held, []
            return tensors
        except _RefusedError as error:
            raise DirectTransportError(f"Object {object_id[:16]} was not received: {error}") from None
        except Exception as error:
            if again and isinstance(error, ChannelLostError) and not self._given_up:
                self.give_up("the link was used after its end")
                raise _NotBegunError from None
            why = self._why(error)
            self.give_up(f"{self._here.who} gave up: {why}")
            raise DirectTransportError(f"Object {object_id[:16]} was not received: {why}") from error

    def give_up(self, why: str) -> None:
        """End the link, a transfer that is under way, and its communicator. May be called in any thread."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = why
        if self._channel is not None:
            with contextlib.suppress(ChannelLostError):
                self._channel.say(Failed(why))
            self._channel.close()
        if self._pair is not None:
            self._pair.end(why)

    def _open(self, deadline: float) -> Pair:
        self._doing = "the two processes connected"
        address = self._origin.address
        connection = socket.create_connection((address.host, address.port), timeout=_left(deadline))
        self._channel = Channel(connection, self._here.settings.silence_s, self._lost)
        hello = Hello(address.token, self._origin.device, self._here.who, self._here.place(self._device))
        welcome = self._ask(hello, Welcome, deadline, self._doing)
        self._sender = welcome.who
        made = Connecting(self._device, RECEIVER, welcome.root, self._here.limit_s).result(deadline, self._check)
        with self._lock:
            self._pair = made
        self._check()
        return made

    def _ask(self, question: Message, answer: type[M], deadline: float, doing: str) -> M:
        self._doing = doing
        assert self._channel is not None
        self._channel.say(question)
        said = self._channel.hear(_left(deadline))
        if isinstance(said, Refused):
            raise _RefusedError(said.text)
        if not isinstance(said, answer):
            raise ChannelLostError(f"it answered {type(said).__name__} to {type(question).__name__}")
        return said

    def _lost(self, why: str) -> None:
        if self._pair is not None:
            self._pair.end(f"{self._sender} is gone: {why}")

    def _check(self) -> None:
        if not self.usable:
            raise ChannelLostError(self._given_up or (self._channel.lost if self._channel else ""))

    def _why(self, error: Exception) -> str:
        if self._given_up:
            return self._given_up
        if isinstance(error, TimeoutError):
            return f"{self._sender} was silent for {self._here.limit_s:g} s while {self._doing}. {_LONGER}"
        if isinstance(error, ConnectionError | OSError) and self._channel is None:
            return f"{self._sender} has ended ({error}). {_ANEW}"
        lost = self._channel.wait_lost(_END_S) if self._channel is not None else ""
        if self._channel is not None and self._channel.told:
            return f"{self._sender} gave up while {self._doing}: {lost}"
        if lost or isinstance(error, ChannelLostError):
            return f"{self._sender} is gone, while {self._doing} ({lost or error}). {_ANEW}"
        return f"{error}"


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
