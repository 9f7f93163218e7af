"""The end of all lifelines, in the process that owns the others: executor and workers, manager and engine cores."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from vllm_ray_ascend.lifecycle.messages import (
    ASK,
    Address,
    Doing,
    Failed,
    HasRead,
    Hello,
    Holds,
    Message,
    Report,
    Segment,
    Witness,
    parse,
)
from vllm_ray_ascend.lifecycle.sockets import keep_alive, listen

_CHUNK = 65536
_MOST_UNREAD = 1 << 20


@dataclass
class Peer:
    """A process at the other end. ``spent``: seconds that each part of its start took, in order."""

    rank: int
    pid: int
    node: str
    physical: int | None = None
    device: str = "NPU"
    doing: str = ""
    since: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=dict)
    segments: list[str] = field(default_factory=list)
    report: str | None = None
    failed: bool = False
    dying: bool = False

    def where(self) -> str:
        """Node and NPU, as messages have it."""
        return f"node {self.node}" + ("" if self.physical is None else f", physical {self.device} {self.physical}")


@dataclass(frozen=True)
class Loss:
    """A peer that is of no more use. ``failure`` is what it said; empty where its process is gone without a word."""

    rank: int
    pid: int
    where: str
    failure: str
    segments: tuple[str, ...] = ()


class Hub:
    """Knows at once when a peer is gone. ``on_loss`` is called in the hub's thread, once for each peer."""

    def __init__(self, host: str, silence_s: float, on_loss: Callable[[Loss], None]) -> None:
        self._on_loss = on_loss
        self.on_read: Callable[[int], None] = lambda _: None
        """Called in the hub's thread with the rank that has read its message."""
        self._silence_s = silence_s
        self._listener = listen(host)
        self._token = secrets.token_hex(8)
        self.address = Address(host, self._listener.getsockname()[1], self._token)
        self._peers: dict[socket.socket, Peer] = {}
        self._witnesses: dict[socket.socket, tuple[int, int]] = {}
        """For each connection of a witness the rank and the process that it ends with."""
        self._unread: dict[socket.socket, bytes] = {}
        self._changed = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (self._listener, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True, name="RayAscendHub")
        self._thread.start()

    def text(self) -> str:
        """The address, as a Lifeline takes it."""
        return msgspec.json.encode(self.address).decode()

    def peers(self) -> list[Peer]:
        """Those that are connected, by rank."""
        with self._changed:
            return sorted(self._peers.values(), key=lambda peer: peer.rank)

    def ranks(self) -> list[int]:
        """Ranks of those that are connected."""
        return [peer.rank for peer in self.peers()]

    def order(self, command: bytes, but: int | None = None) -> None:
        """Send STOP, DIE or ASK to all ranks ``but`` one."""
        self._send(command, lambda rank: rank != but)

    def tell(self, rank: int, command: bytes) -> None:
        """Send a command to one rank."""
        self._send(command, lambda each: each == rank)

    def ask(self, limit_s: float) -> dict[int, str | None]:
        """What each rank says that it is doing; None for one that does not answer within ``limit_s`` seconds."""
        with self._changed:
            peers = list(self._peers.values())
            for peer in peers:
                peer.report = None
        self.order(ASK)
        with self._changed:
            self._changed.wait_for(lambda: not self._owing(peers), limit_s)
            return {peer.rank: peer.report for peer in sorted(peers, key=lambda peer: peer.rank)}

    def wait_until_gone(self, limit_s: float) -> list[int]:
        """Wait until nobody is connected; the ranks that still are after ``limit_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._peers, limit_s)
        return self.ranks()

    def close(self) -> None:
        """Close all connections; peers that still live then end. May be called in any thread, and again."""
        with contextlib.suppress(OSError):
            self._wake.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _send(self, command: bytes, wanted: Callable[[int], bool]) -> None:
        with self._changed:
            for connection, peer in self._peers.items():
                if wanted(peer.rank):
                    with contextlib.suppress(OSError):
                        connection.send(command)

    def _owing(self, asked: list[Peer]) -> bool:
        """Whether an answer is still to come: not of those that are gone."""
        return any(peer.report is None for peer in self._peers.values() if peer in asked)

    def _run(self) -> None:
        while True:
            ready = self._selector.select()
            for key, _ in sorted(ready, key=lambda each: each[0].fileobj in self._witnesses):  # last words come first
                if key.fileobj is self._woken:
                    self._close_all()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        keep_alive(connection, self._silence_s)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_CHUNK)
        except OSError:
            data = b""
        *lines, rest = (self._unread.pop(connection, b"") + data).split(b"\n")
        known = all(self._take(connection, parse(text)) for text in lines)
        if data and known and len(rest) < _MOST_UNREAD:
            self._unread[connection] = rest
        else:
            self._drop(connection)

    def _take(self, connection: socket.socket, message: Message | None) -> bool:
        """Note what a peer says; whether it is one of ours."""
        loss = None
        with self._changed:
            peer = self._peers.get(connection)
            if peer is None:
                if not isinstance(message, Hello | Witness) or message.token != self._token:
                    return False
                if isinstance(message, Witness):
                    self._witnesses[connection] = (message.rank, message.pid)
                else:
                    self._peers[connection] = Peer(message.rank, message.pid, message.node)
            elif isinstance(message, Holds):
                peer.physical, peer.device = message.physical, message.device
            elif isinstance(message, Doing):
                _next_part(peer, message.what)
            elif isinstance(message, Segment):
                peer.segments.append(message.name)
            elif isinstance(message, Report):
                peer.report = message.text
            elif isinstance(message, Failed) and not peer.failed:
                peer.failed = True
                loss = Loss(peer.rank, peer.pid, peer.where(), message.text)
            self._changed.notify_all()
        if loss is not None:
            self._on_loss(loss)
        if isinstance(message, HasRead) and peer is not None:
            self.on_read(peer.rank)
        return True

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._unread.pop(connection, None)
        with self._changed:
            gone = self._peers.pop(connection, None)
            ends = self._witnesses.pop(connection, None)
            lost = gone or next((peer for peer in self._peers.values() if (peer.rank, peer.pid) == ends), None)
            self._changed.notify_all()
        if lost is not None and not lost.dying:
            lost.dying = True
            self._on_loss(Loss(lost.rank, lost.pid, lost.where(), "", tuple(lost.segments)))

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        with self._changed:
            self._peers.clear()
            self._witnesses.clear()
            self._changed.notify_all()


def _next_part(peer: Peer, what: str) -> None:
    now = time.monotonic()
    if peer.doing:
        peer.spent[peer.doing] = now - peer.since
    peer.doing, peer.since = what, now
