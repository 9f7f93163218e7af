"""vLLM's message queue, with reads that another thread can end, over shared memory and over TCP alike.

vLLM 0.23 to 0.33 can end an idle read over shared memory only: a request whose worker died on another node hangs for
300 s, vLLM's limit of an execution. And its shared memory keeps its name as long as the queue lives, so that a process
that is killed leaves it behind: the name is only needed until all ends have it open.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import zmq
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from vllm_ray_ascend.compat.rebind import replace, upstream

_POLL_MS = 100


def drop_name(queue: MessageQueue | None) -> None:
    """Remove the name of the shared memory that this end has made; who has it open keeps it."""
    buffer = getattr(queue, "buffer", None)
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False
        with contextlib.suppress(FileNotFoundError):
            buffer.shared_memory.unlink()


def drop_names() -> None:
    """From now on every queue of vLLM in this process, such as those of its groups, drops its name when all ends are
    ready."""
    wait = upstream(MessageQueue, "wait_until_ready")

    def wait_until_ready(queue: MessageQueue) -> None:
        wait(queue)
        drop_name(queue)

    replace(MessageQueue, "wait_until_ready", wait_until_ready)


class CancellableQueue(MessageQueue):
    """A MessageQueue whose readers end with the exception given to `cancel`."""

    _cancelled: BaseException | None = None
    _cancel_writer: Any = None
    _cancel_reader: Any = None
    _poller: Any = None

    working_on: str = ""
    """In a worker: the method that it was last asked for, until it asks for the next one."""
    working_since: float = 0.0
    """When that was read, as time.monotonic() has it."""

    @staticmethod
    def create_from_handle(handle: Any, rank: int) -> CancellableQueue:
        """The reading end, as vLLM's."""
        queue: Any = MessageQueue.create_from_handle(handle, rank)
        queue.__class__ = CancellableQueue
        if queue._is_remote_reader:
            context = zmq.Context()
            address = f"inproc://cancel-{id(queue)}"
            queue._cancel_reader, queue._cancel_writer = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
            queue._cancel_reader.bind(address)
            queue._cancel_writer.connect(address)
            queue._poller = zmq.Poller()
            for socket in (queue.remote_socket, queue._cancel_reader):
                queue._poller.register(socket, zmq.POLLIN)
        reading: CancellableQueue = queue
        return reading

    def segment(self) -> str | None:
        """Name of the shared memory of this queue; None over TCP."""
        buffer = getattr(self, "buffer", None)
        return None if buffer is None else str(buffer.shared_memory.name)

    def cancel(self, error: BaseException) -> None:
        """End this and every later read, and a wait for the other ends, with ``error``; for one other thread than the
        reader's."""
        if self._cancelled is not None:
            return
        self._cancelled = error
        if self._cancel_writer is not None:
            self._cancel_writer.send(b"")
        if not self._is_writer:
            self.shutdown()

    def wait_until_ready(self) -> None:
        """Wait for the other ends, as vLLM's; raises what `cancel` was given."""
        queue: Any = self
        local, remote = queue.local_socket, queue.remote_socket
        queue.local_socket, queue.remote_socket = (socket and _Patient(socket, self) for socket in (local, remote))
        try:
            super().wait_until_ready()
        finally:
            queue.local_socket, queue.remote_socket = local, remote
        drop_name(self)

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """The next object, as vLLM's; raises what `cancel` was given."""
        self.working_on = ""
        try:
            if self._poller is not None:
                timeout = self._wait_for_either(timeout)
            if self._cancelled is not None:
                raise self._cancelled
            item = super().dequeue(timeout, indefinite)
        except RuntimeError:
            if self._cancelled is not None:
                raise self._cancelled from None
            raise
        self.working_since = time.monotonic()
        method = item[0] if isinstance(item, tuple) and item else ""
        self.working_on = method if isinstance(method, str) else "a function"
        return item

    def _wait_for_either(self, timeout: float | None) -> float | None:
        """Return when there is something to read, or the queue is cancelled, or ``timeout`` seconds are over: what is
        left of them."""
        if timeout is None:
            self._poller.poll()
            return None
        deadline = time.monotonic() + timeout
        self._poller.poll(max(0.0, timeout) * 1000)
        return max(0.0, deadline - time.monotonic())


class _Patient:
    """A socket whose `recv` ends when its queue is cancelled."""

    def __init__(self, socket: Any, queue: CancellableQueue) -> None:
        self._socket = socket
        self._queue = queue
        self.send = socket.send

    def recv(self) -> Any:
        while not self._socket.poll(_POLL_MS):
            if self._queue._cancelled is not None:
                raise self._queue._cancelled
        return self._socket.recv()
