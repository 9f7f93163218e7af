"""A TCP connection between a process and the one that owns it, by which each learns at once that the other is gone.

The kernel closes a dead process's connections, on whatever node it was, so that no Ray timeout stands between a
worker's death and the executor's knowing it, or the driver's and its workers'. A node that vanishes without a word is
found by keep-alive. Orders come this way too: a worker that is stuck in HCCL answers nothing else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import msgspec

from vllm_ray_ascend.lifecycle import witness
from vllm_ray_ascend.lifecycle.messages import ASK, DIE, READ, STOP, Address, Failed, Hello, Message, Report, line
from vllm_ray_ascend.lifecycle.sockets import connect, keep_alive

_FRAMES = 6


class Lifeline:
    """The owned process's end. All callbacks are called in its thread.

    ``on_stop()``: end in order. ``on_end(lost)``: end now; lost: the owner is gone. ``activity()``: what this process
    is doing, in a few words. ``on_read()``: what this process sent last was read.
    """

    def __init__(
        self,
        text: str,
        rank: int,
        node: str,
        silence_s: float,
        *,
        on_stop: Callable[[], None],
        on_end: Callable[[bool], None],
        activity: Callable[[], str],
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Connects. Raises OSError where the owner cannot be reached."""
        address = msgspec.json.decode(text, type=Address)
        self._on_stop, self._on_end, self._activity, self._on_read = on_stop, on_end, activity, on_read
        self._closed = False
        self._sending = threading.Lock()
        self._socket = connect(address)
        keep_alive(self._socket, silence_s)
        self.tell(Hello(address.token, rank, os.getpid(), node))
        threading.Thread(target=self._run, daemon=True, name="RayAscendLifeline").start()
        witness.start(address, rank, silence_s)

    def tell(self, message: Message) -> None:
        """Send a message, from any thread. An owner that is gone is found by the thread that reads."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(line(message))

    def fail(self, error: BaseException, explanation: str | None = None) -> None:
        """Tell the owner that this process cannot go on, why, and what that means where it is known."""
        said = f"{type(error).__name__}: {error}"
        self.tell(Failed(f"{said}\n{explanation}" if explanation else said))

    def close(self) -> None:
        """Tell the owner that this process is done: it need not wait for its end."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while True:
            try:
                order = self._socket.recv(1)
            except OSError:
                order = b""
            if self._closed:
                return
            if order == ASK:
                self.tell(Report(f"{self._activity()}, at {_place()}"))
            elif order == READ:
                self._on_read()
            elif order == STOP:
                self._on_stop()
            else:
                self._on_end(order != DIE)
                return


def _place() -> str:
    """Where the main thread is: its innermost frames, outermost first."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    stack = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
    return " > ".join(f"{entry.filename.rpartition('/')[2]}:{entry.lineno} {entry.name}" for entry in stack)
