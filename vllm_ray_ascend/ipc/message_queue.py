"""vLLM's message queue, with reads that another thread can cancel, over shared memory and over TCP alike.

vLLM 0.23 to 0.33 can end an idle read over shared memory only: a request whose worker died on another node hangs for
300 s, vLLM's execution timeout. Between nodes vLLM uses ZeroMQ with its I/O threads; here it is a TCP queue
(ipc/tcp_queue.py). And vLLM's shared memory keeps its name as long as the queue lives, so that a killed process leaves
it behind: the name is needed only until all ends have it open.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.utils.network_utils import get_ip

from vllm_ray_ascend import patches
from vllm_ray_ascend.ipc.relay import Relay, RelayedReader, RelayingReader, open_reader, plan_relays
from vllm_ray_ascend.ipc.shared_memory import remove_files
from vllm_ray_ascend.ipc.tcp_queue import QueueReader, TcpQueueWriter

_POLL_MS = 100
_REASON_WAIT_S = 1.0
"""How long after a connection error the executor's reason for it may arrive (see `CancellableQueue.cancel`)."""
_RELAYED_REASON_WAIT_S = 10.0
"""The same where a rank's connection to its node's first rank ends: that one may have heard the reason sooner."""
_SPIN_SOCKETS = ("local_notify_socket", "write_cancel_socket", "read_cancel_socket")
"""Sockets of vLLM's SpinCondition."""
_TCP_ADDRESS = "vllm_ray_ascend_tcp_address"
"""Attribute of a queue's handle: the address of its writer."""
_RELAYS = "vllm_ray_ascend_relays"
"""Attribute of a queue's handle: how nodes of several readers get its messages."""

socket_files: set[str] = set()
"""Socket files of all queues of which this process has had an end. It removes them at exit, as the writer may have been
killed."""


segments: set[str] = set()
"""Names of the shared memory of all of vLLM's queues of which this process has had an end, once `record_segments` was
called. What else a process has mapped, such as a user's own segments, is not ours to remove."""


def record_segments() -> None:
    """Have every queue of vLLM in this process, such as those of its groups, add its shared memory to `segments`."""
    patches.wrap("vllm.distributed.device_communicators.shm_broadcast.ShmRingBuffer.__init__", _recording_segment)


def _recording_segment(initialize: Callable[..., None]) -> Callable[..., None]:
    def initialize_and_record(buffer: Any, *args: Any, **kwargs: Any) -> None:
        initialize(buffer, *args, **kwargs)
        if (memory := getattr(buffer, "shared_memory", None)) is not None:  # None: it is another node's
            segments.add(memory.name)

    return initialize_and_record


def unlink_shared_memory(queue: MessageQueue | None) -> None:
    """Remove the name of the shared memory that this end has created; processes that have it open keep it."""
    buffer = getattr(queue, "buffer", None)
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False
        with contextlib.suppress(FileNotFoundError):
            buffer.shared_memory.unlink()


def socket_paths(handle: Any) -> list[str]:
    """Return the paths of the IPC sockets of a queue on its node. They can be removed once all ends are connected."""
    addresses = (getattr(handle, name, None) for name in ("local_subscribe_addr", "local_notify_addr"))
    return [address.removeprefix("ipc://") for address in addresses if address]


def message_queues(executor: Any) -> list[CancellableQueue]:
    """Return the queues that an executor has now: none before it has created them, and none after its shutdown."""
    queues = (getattr(executor, "rpc_broadcast_mq", None), *getattr(executor, "response_mqs", ()))
    return [queue for queue in queues if queue is not None]


def unlink_shared_memory_when_ready() -> None:
    """Have every queue of vLLM in this process, such as those of its groups, unlink its name once all are ready."""
    target = "vllm.distributed.device_communicators.shm_broadcast.MessageQueue.wait_until_ready"
    patches.wrap(target, _with_unlinked_shared_memory)


def _with_unlinked_shared_memory(wait: Callable[[MessageQueue], None]) -> Callable[[MessageQueue], None]:
    def wait_until_ready(queue: MessageQueue) -> None:
        socket_files.update(socket_paths(queue.handle))
        wait(queue)
        unlink_shared_memory(queue)

    return wait_until_ready


def _check_nothing() -> None:
    pass


class CancellableQueue(MessageQueue):  # type: ignore[misc]  # vLLM is untyped
    """A MessageQueue whose ends stop with the exception given to `cancel`, and which uses TCP between nodes.

    A node with a relay (ipc/relay.py) has one TCP connection, and hands the messages on to its other readers itself.

    No call waits without an end: each ends by `cancel`, those that write also by `write_limit_s`, those that wait for
    readiness also by what `check_ready` raises.
    """

    local_socket: Any
    remote_socket: Any
    _tcp: QueueReader | TcpQueueWriter | None = None
    _cancelled: BaseException | None = None

    write_limit_s: float | None = None
    """Seconds that `enqueue` waits for readers that have taken nothing; None: until `cancel` is called."""
    check_ready: Callable[[], None] = staticmethod(_check_nothing)
    """Called again and again while the other ends are waited for, and may raise."""
    on_write: Callable[[float], None] = staticmethod(lambda _: None)
    """Called with the seconds that each successful write took."""

    current_method: str = ""
    """In a worker: the method of the last message, until the next message is asked for."""
    method_started_at: float = 0.0
    """When that message was read, on the clock of time.monotonic()."""

    def __init__(
        self,
        n_reader: int,
        n_local_reader: int,
        *args: Any,
        connect_ip: str | None = None,
        relays: Sequence[Relay] = (),
        **kwargs: Any,
    ) -> None:
        """Take vLLM's arguments, and the ``relays`` of nodes where several of the readers over TCP are."""
        super().__init__(n_reader, n_local_reader, *args, connect_ip=connect_ip, **kwargs)
        self._prepare()
        self.n_remote_reader -= sum(len(relay.others) for relay in relays)  # to vLLM's code: the connections
        if self.n_remote_reader > 0:
            setattr(self.handle, _RELAYS, list(relays))
            writer = TcpQueueWriter(connect_ip or get_ip(), self.n_remote_reader)
            self._use_tcp(writer)
            setattr(self.handle, _TCP_ADDRESS, writer.address)

    @staticmethod
    def create_from_handle(handle: Any, rank: int) -> CancellableQueue:
        """Create the end of the reader ``rank``, as vLLM does."""
        queue: Any = MessageQueue.create_from_handle(handle, rank)
        queue.__class__ = CancellableQueue
        queue._prepare()
        if queue._is_remote_reader:
            queue._use_tcp(open_reader(getattr(handle, _TCP_ADDRESS), getattr(handle, _RELAYS), rank))
        reader: CancellableQueue = queue
        return reader

    def _prepare(self) -> None:
        socket_files.update(socket_paths(self.handle))
        self._cancel_received = threading.Event()
        if self.local_socket is not None:
            # A reference cycle would leave ZeroMQ's sockets to the garbage collector.
            check = weakref.WeakMethod(self._raise_if_cancelled)
            self.local_socket = _PollingSocket(self.local_socket, lambda: _call_if_alive(check))

    def segment_name(self) -> str | None:
        """Return the name of this queue's shared memory; None over TCP."""
        buffer = getattr(self, "buffer", None)
        return None if buffer is None else str(buffer.shared_memory.name)

    def late_readers(self) -> list[int]:
        """Return the ranks of this node that have no room for the message that this end is handing on to them."""
        return self._tcp.late_readers() if isinstance(self._tcp, RelayingReader) else []

    def cancel(self, error: BaseException) -> None:
        """End the present and every later read, write and wait for readiness with ``error``.

        For one thread other than the one that uses the queue.
        """
        if self._cancelled is not None:
            return
        self._cancelled = error
        self._cancel_received.set()
        self.shutdown()

    def shutdown(self) -> None:
        """Shut down as vLLM's queue does, and close the TCP connections between nodes."""
        super().shutdown()
        if self._tcp is not None:
            self._tcp.close()

    def close(self) -> None:
        """Close all sockets and remove all names. For the thread that used the queue, which does so no longer.

        Left to the garbage collector, ZeroMQ's context may be collected before its sockets, and then waits for them
        forever.
        """
        self.shutdown()
        unlink_shared_memory(self)
        remove_files(socket_paths(self.handle))
        for owner, names in ((self, ("local_socket",)), (self._spin_condition, _SPIN_SOCKETS)):
            for name in names:
                if (socket := getattr(owner, name, None)) is not None:
                    socket.close(linger=0)

    def wait_until_ready(self) -> None:
        """Wait until the other ends are connected, as vLLM does.

        Raises what `cancel` was given, or what `check_ready` raises.
        """
        sockets = self.local_socket, self.remote_socket
        self.local_socket, self.remote_socket = (each and _PollingSocket(each, self._check_ready) for each in sockets)
        try:
            super().wait_until_ready()
        except OSError as error:
            raise self._reason_of(error) from error
        finally:
            self.local_socket, self.remote_socket = sockets
            self.check_ready = _check_nothing
        unlink_shared_memory(self)

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Write an object, as vLLM does, for all readers or for none. Raises what `cancel` was given.

        Raises TimeoutError after ``timeout`` or else `write_limit_s` seconds in which a reader has made no room.
        """
        started = time.monotonic()
        limit_s = self.write_limit_s if timeout is None else timeout
        self._raise_if_cancelled()
        try:
            if isinstance(self._tcp, TcpQueueWriter):
                self._tcp.wait_for_space(limit_s)
                limit_s = limit_s and max(0.0, started + limit_s - time.monotonic())
            super().enqueue(obj, limit_s)
        except ConnectionError as error:
            raise self._reason_of(error) from error
        self.on_write(time.monotonic() - started)

    def acquire_write(self, timeout: float | None = None) -> _Block:
        """Give the next block of shared memory, as vLLM does; waiting for it ends by `cancel` too."""
        return _Block(super().acquire_write, self._raise_if_cancelled, timeout, self._full_message)

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """Return the next object, as vLLM does. Raises what `cancel` was given."""
        self.current_method = ""
        self._raise_if_cancelled()
        try:
            item = super().dequeue(timeout, indefinite)
        except (RuntimeError, ConnectionError) as error:
            raise self._reason_of(error) from error
        self.method_started_at = time.monotonic()
        method = item[0] if isinstance(item, tuple) and item else ""
        self.current_method = method if isinstance(method, str) else "a function"
        return item

    def _raise_if_cancelled(self) -> None:
        if self._cancelled is not None:
            raise self._cancelled

    def _check_ready(self) -> None:
        self._raise_if_cancelled()
        self.check_ready()

    def _full_message(self, limit_s: float) -> str:
        with self.buffer.get_metadata(self.current_idx) as flags:
            unread = [rank for rank, read in zip(self.handle.local_reader_ranks, flags[1:], strict=True) if not read]
        return (
            f"VRA-595: readers {unread} have read none of the last {self.buffer.max_chunks} messages for {limit_s:g} "
            "s: their processes hang or are stopped"
        )

    def _reason_of(self, error: Exception) -> BaseException:
        """Return what has cancelled the queue, else ``error``: a peer may be gone before `cancel` is called here."""
        if isinstance(error, ConnectionError):
            is_relayed = isinstance(self._tcp, RelayedReader)
            self._cancel_received.wait(_RELAYED_REASON_WAIT_S if is_relayed else _REASON_WAIT_S)
        return error if self._cancelled is None else self._cancelled

    def _use_tcp(self, tcp_socket: QueueReader | TcpQueueWriter) -> None:
        """Use ``tcp_socket`` between nodes, in place of the ZeroMQ socket."""
        self.remote_socket.close(linger=0)
        self.remote_socket = self._tcp = tcp_socket


class ExecutorQueues:
    """What an executor's start has in the place of the class MessageQueue: it makes queues with the executor's limits.

    vLLM takes ranks 0 to n-1 for those on the driver's node. That is so only while the driver's bundles come first.
    """

    def __init__(
        self,
        write_limit_s: float | None,
        local_ranks: Callable[[], list[int]],
        check_ready: Callable[[], None],
        other_nodes: Callable[[], list[list[int]]] = list,
        on_write: Callable[[float], None] = lambda _: None,
    ) -> None:
        """``local_ranks()`` are the ranks on the driver's node, ``other_nodes()`` those of each other node.

        The others are CancellableQueue's attributes. A rank that is in neither has a TCP connection of its own.
        """
        self._write_limit_s = write_limit_s
        self._local_ranks = local_ranks
        self._other_nodes = other_nodes
        self._check_ready = check_ready
        self._on_write = on_write

    def __call__(self, n_reader: int, n_local_reader: int, *args: Any, **kwargs: Any) -> CancellableQueue:
        """Create the writing end of a queue to all ranks."""
        relays = plan_relays(self._other_nodes(), self._write_limit_s)
        queue = CancellableQueue(n_reader, n_local_reader, self._local_ranks(), *args, relays=relays, **kwargs)
        return self._limit(queue)

    def create_from_handle(self, handle: Any, rank: int) -> CancellableQueue:
        """Create a reading end."""
        return self._limit(CancellableQueue.create_from_handle(handle, rank))

    def _limit(self, queue: CancellableQueue) -> CancellableQueue:
        queue.write_limit_s, queue.check_ready = self._write_limit_s, self._check_ready
        queue.on_write = self._on_write
        return queue


def ranks_on_node(bundles: Sequence[tuple[int, str, str]], node_id: str) -> list[int]:
    """Return the ranks on a node; ``bundles`` are index, node id and address of each rank's bundle."""
    return [rank for rank, (_, node, _) in enumerate(bundles) if node == node_id]


def ranks_of_other_nodes(bundles: Sequence[tuple[int, str, str]], node_id: str) -> list[list[int]]:
    """Return the ranks of each node but one, in the order of their first ranks; ``bundles`` as for `ranks_on_node`."""
    nodes = dict.fromkeys(node for _, node, _ in bundles if node != node_id)
    return [ranks_on_node(bundles, node) for node in nodes]


class _Block:
    """The next block of shared memory, once there is room. Entered for every message, so that it is no generator."""

    def __init__(
        self,
        acquire: Callable[[float], Any],
        check: Callable[[], None],
        limit_s: float | None,
        late_message: Callable[[float], str],
    ) -> None:
        """``acquire(seconds)`` is vLLM's. ``check`` ends the wait where it raises; TimeoutError after ``limit_s``."""
        self._acquire = acquire
        self._check = check
        self._limit_s = limit_s
        self._late_message = late_message
        self._acquired: Any = None

    def __enter__(self) -> Any:
        started = time.monotonic()
        while True:
            self._check()
            acquired = self._acquire(_POLL_MS / 1000)
            try:
                buffer = acquired.__enter__()
            except TimeoutError:
                if self._limit_s is not None and time.monotonic() - started > self._limit_s:
                    raise TimeoutError(self._late_message(self._limit_s)) from None
            else:
                self._acquired = acquired
                return buffer

    def __exit__(self, *error: Any) -> Any:
        return self._acquired.__exit__(*error)


def _call_if_alive(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (alive := method()) is not None:
        alive()


class _PollingSocket:
    """A socket whose waits end when ``check`` raises."""

    def __init__(self, socket: Any, check: Callable[[], None]) -> None:
        self._socket = socket
        self._check = check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def poll(self, timeout: float | None = None) -> bool:
        """Return whether there is something to receive within ``timeout`` milliseconds."""
        end = None if timeout is None else time.monotonic() + timeout / 1000
        while True:
            remaining_ms = _POLL_MS if end is None else min(_POLL_MS, int((end - time.monotonic()) * 1000))
            if self._socket.poll(max(0, remaining_ms)):
                return True
            self._check()
            if end is not None and time.monotonic() >= end:
                return False

    def recv(self) -> Any:
        """Return the next message."""
        self.poll()
        return self._socket.recv()
