"""vLLM's message queue, with reads that another thread can end, over shared memory and over TCP alike.

vLLM 0.23 to 0.33 can end an idle read over shared memory only: a request whose worker died on another node hangs for
300 s, vLLM's limit of an execution. Between nodes it goes through ZeroMQ's threads; ours does not (lifecycle/wire.py).
And its shared memory keeps its name as long as the queue lives, so that a process that is killed leaves it behind: the
name is only needed until all ends have it open.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.utils.network_utils import get_ip

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.lifecycle.shared_memory import remove
from vllm_ray_ascend.lifecycle.wire import Reader, Writer

_POLL_MS = 100
_WORD_S = 1.0
"""How long the executor's word may be late, that says why an end of a queue is gone."""
_NOTIFYING = ("local_notify_socket", "write_cancel_socket", "read_cancel_socket")
"""Sockets of vLLM's SpinCondition."""
_WIRE = "vllm_ray_ascend_wire"
"""On the handle of a queue: its writer's address."""

socket_files: set[str] = set()
"""Of all queues of which this process has had an end: for its own end, where the writer may be gone without a word."""


def drop_name(queue: MessageQueue | None) -> None:
    """Remove the name of the shared memory that this end has made; who has it open keeps it."""
    buffer = getattr(queue, "buffer", None)
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False
        with contextlib.suppress(FileNotFoundError):
            buffer.shared_memory.unlink()


def files_of(handle: Any) -> list[str]:
    """Of the sockets by which a queue's ends on one node meet: paths, for nobody's use once all are connected."""
    addresses = (getattr(handle, name, None) for name in ("local_subscribe_addr", "local_notify_addr"))
    return [address.removeprefix("ipc://") for address in addresses if address]


def queues_of(executor: Any) -> list[CancellableQueue]:
    """The queues that an executor has now: none before its start has come so far, nor after its end."""
    queues = (getattr(executor, "rpc_broadcast_mq", None), *getattr(executor, "response_mqs", ()))
    return [queue for queue in queues if queue is not None]


def drop_names() -> None:
    """From now on every queue of vLLM in this process, such as those of its groups, drops its name when all ends are
    ready."""
    wait = upstream(MessageQueue, "wait_until_ready")

    def wait_until_ready(queue: MessageQueue) -> None:
        socket_files.update(files_of(queue.handle))
        wait(queue)
        drop_name(queue)

    replace(MessageQueue, "wait_until_ready", wait_until_ready)


class CancellableQueue(MessageQueue):
    """A MessageQueue whose ends stop with the exception given to `cancel`, with TCP of its own between nodes."""

    local_socket: Any
    remote_socket: Any
    _cancelled: BaseException | None = None

    working_on: str = ""
    """In a worker: the method that it was last asked for, until it asks for the next one."""
    working_since: float = 0.0
    """When that was read, as time.monotonic() has it."""

    def __init__(
        self, n_reader: int, n_local_reader: int, *args: Any, connect_ip: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(n_reader, n_local_reader, *args, connect_ip=connect_ip, **kwargs)
        socket_files.update(files_of(self.handle))
        self._heard = threading.Event()
        if self.n_remote_reader > 0:
            check = weakref.WeakMethod(self._check)  # a cycle would leave ZeroMQ's sockets to the garbage collector
            writer = Writer(connect_ip or get_ip(), lambda: _call(check))
            self._take_wire(writer)
            setattr(self.handle, _WIRE, writer.address)

    @staticmethod
    def create_from_handle(handle: Any, rank: int) -> CancellableQueue:
        """The reading end, as vLLM's."""
        queue: Any = MessageQueue.create_from_handle(handle, rank)
        queue.__class__ = CancellableQueue
        socket_files.update(files_of(queue.handle))
        queue._heard = threading.Event()
        if queue._is_remote_reader:
            queue._take_wire(Reader(getattr(handle, _WIRE)))
        reading: CancellableQueue = queue
        return reading

    def segment(self) -> str | None:
        """Name of the shared memory of this queue; None over TCP."""
        buffer = getattr(self, "buffer", None)
        return None if buffer is None else str(buffer.shared_memory.name)

    def cancel(self, error: BaseException) -> None:
        """End this and every later read or write, and a wait for the other ends, with ``error``; for one other thread
        than the one that uses the queue."""
        if self._cancelled is not None:
            return
        self._cancelled = error
        self._heard.set()
        self.shutdown()

    def shutdown(self) -> None:
        """As vLLM's, and the connections between nodes are closed."""
        super().shutdown()
        if isinstance(self.remote_socket, Reader | Writer):
            self.remote_socket.close()

    def close(self) -> None:
        """Close all sockets, and drop all names; for the thread that used the queue, which it does no more.

        Left to the garbage collector, ZeroMQ's context may come before its sockets, and then waits for them for good.
        """
        self.shutdown()
        drop_name(self)
        remove(files_of(self.handle))
        condition = self._spin_condition
        for holder, names in ((self, ("local_socket",)), (condition, _NOTIFYING)):
            for name in names:
                if (socket := getattr(holder, name, None)) is not None:
                    socket.close(linger=0)

    def wait_until_ready(self) -> None:
        """Wait for the other ends, as vLLM's; raises what `cancel` was given."""
        local = self.local_socket
        self.local_socket = local and _Patient(local, self._check)
        try:
            super().wait_until_ready()
        except OSError as error:
            raise self._reason(error) from error
        finally:
            self.local_socket = local
        drop_name(self)

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Write an object, as vLLM's; raises what `cancel` was given."""
        try:
            super().enqueue(obj, timeout)
        except ConnectionError as error:
            raise self._reason(error) from error

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """The next object, as vLLM's; raises what `cancel` was given."""
        self.working_on = ""
        self._check()
        try:
            item = super().dequeue(timeout, indefinite)
        except (RuntimeError, ConnectionError) as error:
            raise self._reason(error) from error
        self.working_since = time.monotonic()
        method = item[0] if isinstance(item, tuple) and item else ""
        self.working_on = method if isinstance(method, str) else "a function"
        return item

    def _check(self) -> None:
        if self._cancelled is not None:
            raise self._cancelled

    def _reason(self, error: Exception) -> BaseException:
        """What ended the queue: its other end may be gone before we hear why."""
        if isinstance(error, ConnectionError):
            self._heard.wait(_WORD_S)
        return error if self._cancelled is None else self._cancelled

    def _take_wire(self, wire: Reader | Writer) -> None:
        """Use ``wire`` between nodes."""
        self.remote_socket.close(linger=0)
        self.remote_socket = wire


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (alive := method()) is not None:
        alive()


class _Patient:
    """A ZeroMQ socket whose `recv` ends when ``check`` raises."""

    def __init__(self, socket: Any, check: Callable[[], None]) -> None:
        self._socket = socket
        self._check = check
        self.send = socket.send

    def recv(self) -> Any:
        while not self._socket.poll(_POLL_MS):
            self._check()
        return self._socket.recv()
