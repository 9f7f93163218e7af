"""TCP connections between the ranks of a communicator, by which the end of a process is known at once.

HCCL reports none: HcclGetCommAsyncError knows errors of RDMA only. The address of rank 0 travels with the root info.
All ranks connect to it, it passes on their addresses, and each connects to all lower ones: a rank that has left, as one
does that has finished, hides no other's end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from vllm_ray_ascend.errors import HcclError
from vllm_ray_ascend.hccl.library import HCCL_E_TCP_CONNECT, ROOT_INFO_BYTES
from vllm_ray_ascend.ipc.authentication import AuthenticatingListener, connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address, JsonLines, keep_alive, shut_down
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

GRACE_S = 0.5
"""For which a transfer may still complete after its peer has gone: what that has sent before counts."""
_LEFT = "has destroyed its communicator"
_ENDED = "is gone: its process has ended, or the connection to it is lost"


class _Notice(msgspec.Struct):
    """A rank that has joined (``reason`` empty), with the host and port at which higher ranks find it, or is gone.

    All know the token of the root info, which is therefore never sent.
    """

    rank: int
    process: str
    reason: str = ""
    place: tuple[str, int] | None = None


class _Lost(NamedTuple):
    text: str
    since: float


_lines: JsonLines[_Notice] = JsonLines(_Notice)
_roots: dict[str, _Root] = {}
"""Of this process, by token: those of a root info whose rank 0 does not exist yet."""
_ROOT_LIFETIME_S = 3600.0
"""For which a root info may be without its rank 0: then a process has failed between the two."""
_MEET_LIMIT_S = 30.0


class _Root(NamedTuple):
    peers: PeerConnections
    expires: float


class PeerConnections:
    """This rank's connections to all others.

    ``on_lost`` is called with the number of each rank that is gone, in a thread of its own.
    """

    def __init__(self, rank: int, silence_s: float) -> None:
        self.on_lost: Callable[[int], None] = lambda rank: None
        self._rank, self._silence_s = rank, silence_s
        self._process = f"pid {os.getpid()} on {socket.gethostname()}"
        self._changed = threading.Condition()
        self._lost: dict[int, _Lost] = {}
        self._sockets: list[socket.socket] = []
        self._joined: dict[int, tuple[_Notice, socket.socket]] = {}
        """At rank 0: what the others have said when they joined."""
        self._listener: AuthenticatingListener | None = None
        self._left = False
        self._token = ""

    def lost_peer(self, peers: Collection[int] | None, grace_s: float = 0.0) -> str:
        """Return which of ``peers`` (None: of all) is gone for ``grace_s`` seconds or longer; empty where none is."""
        latest = time.monotonic() - grace_s
        with self._changed:
            found = (lost for rank, lost in self._lost.items() if peers is None or rank in peers)
            return next((lost.text for lost in found if lost.since <= latest), "")

    def wait_lost(self, peers: Collection[int] | None, limit_s: float) -> str:
        """Return what `lost_peer` does as soon as there is one, or after ``limit_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost_peer(peers), limit_s)
            return self.lost_peer(peers)

    def leave(self) -> None:
        """Notify the others that this rank leaves, and close the connections; from any thread, any number of times."""
        with self._changed:
            self._left, sockets = True, list(self._sockets)
        if self._listener is not None:
            self._listener.close()
        for each in sockets:
            self._send(each, _Notice(self._rank, self._process, _LEFT))
            shut_down(each)

    def add(self, connection: socket.socket, peer: int | None, process: str = "") -> None:
        """Watch a connection; ``peer`` is its rank and ``process`` that of it, where they are known.

        Returns immediately.
        """
        keep_alive(connection, self._silence_s)
        with self._changed:
            self._sockets.append(connection)
            left = self._left
        arguments = connection, peer, process
        threading.Thread(target=self._read, args=arguments, daemon=True, name="RayAscendHcclPeer").start()
        if left:
            shut_down(connection)

    def join(self, connection: socket.socket, token: str, *, has_higher: bool) -> None:
        """Watch the connection to rank 0, and identify this rank to it; with ``has_higher`` accept higher ranks."""
        self._token = token
        address = self.listen(connection.getsockname()[0], token) if has_higher else None
        place = (address.host, address.port) if address else None
        self._send(connection, _Notice(self._rank, self._process, place=place))
        self.add(connection, 0)

    def listen(self, host: str, token: str | None = None) -> Address:
        """Accept other ranks that know ``token``, by default a new one; return where."""
        listener = AuthenticatingListener(
            host, lambda each: self.add(each, None), thread_name="RayAscendHcclPeers", token=token
        )
        self._listener = listener
        return listener.address

    def _read(self, connection: socket.socket, peer: int | None, process: str) -> None:
        reason, leads = "", peer == 0
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                notice = _lines.decode(line)
                if notice is None:
                    break
                if peer is not None and notice.rank != peer:
                    if leads:  # a rank speaks for itself, rank 0 for all
                        self._hear(notice)
                    continue
                peer, process, reason = notice.rank, notice.process, notice.reason
                if self._rank == 0 and not reason:
                    self._introduce(notice, connection)
        with self._changed:
            self._sockets.remove(connection)
        connection.close()
        if peer is not None and not self._left:
            self._report(_Notice(peer, process or "which rank 0 of this communicator was", reason or _ENDED))

    def _hear(self, notice: _Notice) -> None:
        """Take what rank 0 says of another rank: that it is gone, or where it is."""
        if notice.reason:
            self._report(notice)
        elif notice.place is not None:
            threading.Thread(target=self._meet, args=(notice,), daemon=True, name="RayAscendHcclPeer").start()

    def _introduce(self, notice: _Notice, connection: socket.socket) -> None:
        """As rank 0, introduce the rank that has joined and all others: the higher one connects to the lower."""
        with self._changed:
            others = list(self._joined.values())
            self._joined[notice.rank] = notice, connection
        for other, its_connection in others:
            if other.rank < notice.rank:
                self._send(connection, other)
            else:
                self._send(its_connection, notice)

    def _meet(self, notice: _Notice) -> None:
        """Connect to a lower rank. Where its port is not open to this node, rank 0 reports its end, while there."""
        assert notice.place is not None
        try:
            connection = connect_authenticated(Address(*notice.place, self._token), _MEET_LIMIT_S)
        except OSError as error:
            logger.info("rank %d has no connection to rank %d of a communicator: %s", self._rank, notice.rank, error)
            return
        self._send(connection, _Notice(self._rank, self._process))
        self.add(connection, notice.rank, notice.process)

    def _report(self, notice: _Notice) -> None:
        """Record that a rank is gone, once, and pass it on."""
        with self._changed:
            if notice.rank in self._lost:
                return
            text = f"rank {notice.rank} ({notice.process}) {notice.reason}"
            self._lost[notice.rank] = _Lost(text, time.monotonic())
            self._changed.notify_all()
            others = list(self._sockets) if self._rank == 0 else []
        for each in others:
            self._send(each, notice)
        self.on_lost(notice.rank)

    @staticmethod
    def _send(connection: socket.socket, notice: _Notice) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(_lines.encode(notice))


def add_address(root_info: bytes, host: str, silence_s: float) -> bytes:
    """Return HCCL's root info and the address on ``host`` at which this process, to be rank 0, accepts the others."""
    now = time.monotonic()
    for token in [token for token, root in list(_roots.items()) if root.expires <= now]:
        _roots.pop(token).peers.leave()
    peers = PeerConnections(0, silence_s)
    address = peers.listen(host)
    _roots[address.token] = _Root(peers, now + _ROOT_LIFETIME_S)
    return root_info + msgspec.json.encode(address)


def connect_peers(root_info: bytes, rank: int, size: int, limit_s: float, silence_s: float) -> PeerConnections:
    """Return this rank's connections, by the address in ``root_info``; none where it has no address.

    Raises HcclError where rank 0 is not there.
    """
    connections = PeerConnections(rank, silence_s)
    if len(root_info) <= ROOT_INFO_BYTES:
        return connections
    address = msgspec.json.decode(root_info[ROOT_INFO_BYTES:], type=Address)
    if rank == 0:
        root = _roots.pop(address.token, None)
        return root.peers if root else connections
    try:
        connections.join(connect_authenticated(address, limit_s), address.token, has_higher=rank + 1 < size)
    except OSError as error:
        raise HcclError(
            "VRA-546",
            f"Rank {rank} of an HCCL communicator cannot connect to its rank 0 at {address}: {error}. That process has "
            "ended, or its port is not open to this node: see its log.",
            HCCL_E_TCP_CONNECT,
        ) from error
    return connections
