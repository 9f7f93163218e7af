"""The server of the control connections, in the process that owns others: executor and workers, manager and engines."""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from vllm_ray_ascend.control.ipc_resources import MAX_RESOURCES, is_removable
from vllm_ray_ascend.control.open_files import raise_file_limit, simultaneous_connections
from vllm_ray_ascend.control.protocol import (
    MAX_HELLO_BYTES,
    MAX_LINE_BYTES,
    REQUEST_STATUS,
    Command,
    DeviceOpened,
    EventReported,
    Extension,
    Failed,
    Hello,
    IpcResource,
    Message,
    PhaseStarted,
    SentinelHello,
    StatusReport,
    decode_message,
    encode_message,
)
from vllm_ray_ascend.ipc.authentication import AuthenticatingListener
from vllm_ray_ascend.ipc.sockets import keep_alive, shut_down
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_RECEIVE_BYTES = 65536


@dataclass(eq=False)
class Peer:
    """A connected process. ``phase_seconds``: what each phase of its startup took, in order."""

    rank: int
    pid: int
    node: str
    physical: int | None = None
    device: str = "NPU"
    log: str = ""
    phase: str = ""
    phase_started_at: float = field(default_factory=time.monotonic)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    ipc_resources: list[str] = field(default_factory=list)
    report: str | None = None
    heard_at: float = field(default_factory=time.monotonic)
    """When its last message arrived."""
    asked_at: float | None = None
    round_trip_s: float | None = None
    """Seconds from the last request for its status to the answer."""
    failure_reported: bool = False
    loss_reported: bool = False

    def location(self) -> str:
        """Return node and device, as messages name them."""
        return f"node {self.node}" + ("" if self.physical is None else f", physical {self.device} {self.physical}")

    def note_report(self, text: str) -> None:
        """Note what the process is doing, and how long it took to say so where it was asked."""
        self.report = text
        if self.asked_at is not None:
            self.round_trip_s, self.asked_at = time.monotonic() - self.asked_at, None

    def start_phase(self, phase: str) -> None:
        """Note that a phase begins, and what the last one took."""
        now = time.monotonic()
        if self.phase:
            self.phase_seconds[self.phase] = now - self.phase_started_at
        self.phase, self.phase_started_at = phase, now


@dataclass(frozen=True)
class PeerLost:
    """A process that failed or died. ``failure`` is the failure that it reported; empty where its process died.

    ``log`` is the file on its node with its output; empty where that is not known. ``heard_at`` is when its last
    message arrived, by time.monotonic(), None where it has no connection.
    """

    rank: int
    pid: int
    location: str
    failure: str
    ipc_resources: tuple[str, ...] = ()
    log: str = field(default="", compare=False)
    heard_at: float | None = field(default=None, compare=False)


class _ReportRequest:
    """A wait for the reports of ``peers``, which ends with the last of them. Used under the server's lock."""

    def __init__(self, peers: Iterable[Peer]) -> None:
        self.reports: dict[Peer, str | None] = dict.fromkeys(peers)
        self._pending = set(self.reports)
        self.answered = threading.Event()
        if not self._pending:
            self.answered.set()

    def mark_answered(self, peer: Peer, report: str | None) -> None:
        """Note that ``peer`` has answered, or that it never will: None."""
        if peer in self._pending:
            self.reports[peer] = report
        self._pending.discard(peer)
        if not self._pending:
            self.answered.set()


class ControlServer:
    """Detects immediately that a connected process is gone.

    ``on_peer_lost`` is called in the server's thread, once for each process that dies, and once for each that reports
    a failure. No connection can end that thread: whatever a peer sends, only its own connection is closed.
    """

    def __init__(
        self,
        host: str,
        silence_s: float,
        on_peer_lost: Callable[[PeerLost], None],
        *,
        processes: int = 1,
        socket_folder: str = "",
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Listen on ``host``. ``silence_s``: seconds without an answer after which a node counts as lost.

        ``processes`` is the number of those that will connect. Sockets that they name must lie in ``socket_folder``.
        ``on_error`` is called, in a thread of the server, with an error after which deaths may not be reported any
        more: one that a callback has raised, or one of the server itself.

        Raises ClusterResourceError where this process may not open the files that ``processes`` need.
        """
        raise_file_limit(processes)
        self._on_peer_lost = on_peer_lost
        self.on_extension: Callable[[int, str], None] = lambda *_: None
        """Called in the server's thread with the rank that sent an Extension, and its name."""
        self.on_event: Callable[[int, EventReported], None] = lambda *_: None
        """Called in the server's thread with the rank that reports an event."""
        self._on_error = on_error or _log_error
        self._silence_s = silence_s
        self._socket_folder = socket_folder
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, Peer] = {}
        self._peers_by_process: dict[tuple[int, int], Peer] = {}
        """By rank and pid."""
        self._latest_peers: dict[int, Peer] = {}
        """The last process of each rank, connected or not."""
        self._sentinels: dict[socket.socket, tuple[int, int]] = {}
        """For each connection of an exit sentinel: rank and pid of the process with which it ends."""
        self._requests: list[_ReportRequest] = []
        self._nobody_connected = threading.Condition(self._lock)
        self._partial_lines: dict[socket.socket, bytes] = {}
        self._accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        """Connections that the listener has authenticated, for the server's thread."""
        self._closing = False
        self._wake_writer, self._wake_reader = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._listener = AuthenticatingListener(
            host,
            self._hand_over,
            max_handshakes=simultaneous_connections(processes),
            on_error=self._on_error,
            thread_name="RayAscendControlListener",
        )
        self.address = self._listener.address
        self._thread = threading.Thread(target=self._serve_connections, daemon=True, name="RayAscendControlServer")
        self._thread.start()

    def address_json(self) -> str:
        """Return the address with its token, as a ControlClient takes it."""
        return msgspec.json.encode(self.address).decode()

    def peers(self) -> list[Peer]:
        """Return the connected processes, by rank."""
        with self._lock:
            return sorted(self._peers.values(), key=lambda peer: peer.rank)

    def latest_peers(self) -> list[Peer]:
        """Return the last process of each rank, also where it has ended, with what it said last."""
        with self._lock:
            return sorted(self._latest_peers.values(), key=lambda peer: peer.rank)

    def connected_ranks(self) -> list[int]:
        """Return the ranks of the connected processes, in order."""
        return [peer.rank for peer in self.peers()]

    def broadcast(self, message: Command | Extension, exclude: int | None = None) -> None:
        """Send a message to all ranks but ``exclude``. Never waits: a process that does not read is disconnected."""
        self._send_to_ranks(message, lambda rank: rank != exclude)

    def send(self, rank: int, message: Command | Extension) -> None:
        """Send a message to one rank, as `broadcast` does."""
        self._send_to_ranks(message, lambda each: each == rank)

    def request_reports(self, limit_s: float) -> dict[int, str | None]:
        """Return what each rank is doing; None for one that does not answer within ``limit_s`` seconds."""
        with self._lock:
            peers = sorted(self._peers.values(), key=lambda peer: peer.rank)
            for peer in peers:
                peer.asked_at = time.monotonic()
            request = _ReportRequest(peers)
            self._requests.append(request)
        self.broadcast(REQUEST_STATUS)
        request.answered.wait(limit_s)
        with self._lock:
            self._requests.remove(request)
            return {peer.rank: report for peer, report in request.reports.items()}

    def wait_for_exit(self, limit_s: float) -> list[int]:
        """Wait until nobody is connected; return the ranks that still are after ``limit_s`` seconds."""
        with self._lock:
            self._nobody_connected.wait_for(lambda: not self._peers, limit_s)
        return self.connected_ranks()

    def close(self) -> None:
        """Close all connections, upon which clients that still live end. May be called in any thread, and again."""
        self._closing = True
        self._listener.close()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _send_to_ranks(self, message: Command | Extension, is_wanted: Callable[[int], bool]) -> None:
        line = encode_message(message)
        with self._lock:
            for connection, peer in self._peers.items():
                if is_wanted(peer.rank):
                    _send_or_shut_down(connection, line)

    def _hand_over(self, connection: socket.socket) -> None:
        """Have the server's thread serve a connection. Called in the listener's thread."""
        self._accepted.put(connection)
        self._wake()
        if self._closing:
            self._close_accepted()

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._wake_writer.send(b"x", socket.MSG_DONTWAIT)  # where it does not fit, the thread is awake already

    def _serve_connections(self) -> None:
        try:
            while not self._closing:
                ready = self._selector.select()
                # Sentinels last: a failure that a process reported before its exit is read first.
                for key, _ in sorted(ready, key=lambda each: each[0].fileobj in self._sentinels):
                    if key.fileobj is self._wake_reader:
                        self._take_accepted()
                    else:
                        self._serve_connection(key.fileobj)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  whatever it is: no death would be noticed any more
            self._on_error(error)
        finally:
            self._close_connections()

    def _take_accepted(self) -> None:
        self._wake_reader.recv(_RECEIVE_BYTES)
        with contextlib.suppress(queue.Empty):
            while True:
                connection = self._accepted.get_nowait()
                try:
                    keep_alive(connection, self._silence_s)
                except OSError:  # it has been reset already
                    connection.close()
                    continue
                self._selector.register(connection, selectors.EVENT_READ)

    def _serve_connection(self, connection: socket.socket) -> None:
        if not self._read_messages(connection):
            self._drop_connection(connection)

    def _read_messages(self, connection: socket.socket) -> bool:
        """Handle what a connection has sent. Return False where it has ended, or is to be closed."""
        try:
            data = connection.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, rest = (self._partial_lines.pop(connection, b"") + data).split(b"\n")
        for line in lines:
            if len(line) > self._line_limit(connection) or not self._handle_message(connection, decode_message(line)):
                return False
        if len(rest) > self._line_limit(connection):
            return False
        if rest:
            self._partial_lines[connection] = rest
        return bool(data)

    def _line_limit(self, connection: socket.socket) -> int:
        return MAX_LINE_BYTES if connection in self._peers else MAX_HELLO_BYTES

    def _handle_message(self, connection: socket.socket, message: Message | None) -> bool:
        """Note what a process sent; None, a line that is no message, is ignored, unless it is the first.

        Return False for a connection that does not say whose it is.
        """
        loss = None
        with self._lock:
            peer = self._peers.get(connection)
            if peer is None:
                return self._identify(connection, message)
            previous, peer.heard_at = peer.heard_at, time.monotonic()
            if isinstance(message, DeviceOpened):
                peer.physical, peer.device = message.physical, message.device
            elif isinstance(message, PhaseStarted):
                peer.start_phase(message.phase)
            elif isinstance(message, IpcResource):
                self._note_ipc_resource(peer, message.name)
            elif isinstance(message, StatusReport):
                peer.note_report(message.text)
                self._mark_reports_answered(peer, message.text)
            elif isinstance(message, Failed) and not peer.failure_reported:
                peer.failure_reported = True
                loss = PeerLost(peer.rank, peer.pid, peer.location(), message.text, heard_at=previous)
        if loss is not None:
            self._notify(lambda: self._on_peer_lost(loss))
        if isinstance(message, Extension):
            self._notify(lambda: self.on_extension(peer.rank, message.name))
        if isinstance(message, EventReported):
            self._notify(lambda: self.on_event(peer.rank, message))
        return True

    def _identify(self, connection: socket.socket, message: Message | None) -> bool:
        """Note whose connection it is by its first message. Return False where that does not say it."""
        if isinstance(message, SentinelHello):
            self._sentinels[connection] = (message.rank, message.pid)
        elif isinstance(message, Hello):
            peer = self._peers[connection] = Peer(message.rank, message.pid, message.node, log=message.log)
            self._peers_by_process[peer.rank, peer.pid] = self._latest_peers[peer.rank] = peer
        else:
            return False
        return True

    def _note_ipc_resource(self, peer: Peer, name: str) -> None:
        if is_removable(name, self._socket_folder) and len(peer.ipc_resources) < MAX_RESOURCES:
            peer.ipc_resources.append(name)
        else:
            logger.debug("rank %d names %r, which is not removed after its death", peer.rank, name)

    def _mark_reports_answered(self, peer: Peer, report: str | None) -> None:
        for request in self._requests:
            request.mark_answered(peer, report)

    def _drop_connection(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._partial_lines.pop(connection, None)
        with self._lock:
            connection.close()  # under the lock, so that no other thread is sending
            lost = self._remove_connection(connection)
        if lost is not None and not lost.loss_reported:
            lost.loss_reported = True
            location, resources = lost.location(), tuple(lost.ipc_resources)
            loss = PeerLost(lost.rank, lost.pid, location, "", resources, lost.log, lost.heard_at)
            self._notify(lambda: self._on_peer_lost(loss))

    def _remove_connection(self, connection: socket.socket) -> Peer | None:
        """Remove a connection from the tables; return the process that has ended with it."""
        exited = self._sentinels.pop(connection, None)
        if exited is not None:
            return self._peers_by_process.get(exited)
        peer = self._peers.pop(connection, None)
        if peer is not None:
            if self._peers_by_process.get((peer.rank, peer.pid)) is peer:
                del self._peers_by_process[peer.rank, peer.pid]
            self._mark_reports_answered(peer, None)
            if not self._peers:
                self._nobody_connected.notify_all()
        return peer

    def _notify(self, call: Callable[[], None]) -> None:
        """Call the owner's callback: what that raises does not end the server, and is reported."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  whatever it is, the owner has not learned of the loss
            self._on_error(error)

    def _close_connections(self) -> None:
        self._listener.close()
        with self._lock:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._wake_writer.close()
            self._peers.clear()
            self._peers_by_process.clear()
            self._sentinels.clear()
            for request in self._requests:
                request.answered.set()
            self._nobody_connected.notify_all()
        self._closing = True
        self._close_accepted()

    def _close_accepted(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._accepted.get_nowait().close()


def _send_or_shut_down(connection: socket.socket, line: bytes) -> None:
    """Send a line without waiting; a process that has not read thousands of them is cut off: it hears no order."""
    try:
        sent = connection.send(line, socket.MSG_DONTWAIT)
    except BlockingIOError:
        sent = 0
    except OSError:
        return
    if sent < len(line):
        shut_down(connection)


def _log_error(error: Exception) -> None:
    logger.error(
        "VRA-334: the control server failed, so that deaths of processes may not be noticed: %s: %s",
        type(error).__name__,
        error,
        exc_info=error,
    )
