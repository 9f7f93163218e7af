"""The control connection of a process to the process that owns it: each detects immediately that the other is gone.

The kernel closes a dead process's connections, on whatever node it was, so that no timeout of Ray stands between a
worker's death and its detection by the executor, or between the driver's death and its detection by the workers.
Silent node loss is detected by TCP keepalive. Commands use the same connection: a worker that is stuck in HCCL answers
nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from types import CodeType

import msgspec

from vllm_ray_ascend.control import exit_sentinel
from vllm_ray_ascend.control.protocol import (
    MAX_LINE_BYTES,
    REQUEST_STATUS,
    STOP,
    TERMINATE,
    Extension,
    Failed,
    Hello,
    Message,
    StatusReport,
    decode_message,
    encode_message,
)
from vllm_ray_ascend.ipc.authentication import connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address, keep_alive, shut_down
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_FRAMES = 6


def output_file() -> str:
    """Return the file that this process's errors are written to, as by Ray in its session's folder; "" for no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""


class ControlClient:
    """The owned process's end. All callbacks are called in its thread.

    - ``on_stop()``: end gracefully;
    - ``on_terminate(lost)``: end immediately; ``lost``: because the owner is gone;
    - ``describe_activity()``: what this process is doing, in a few words;
    - ``on_extension(name)``: an Extension arrived.
    """

    def __init__(
        self,
        address_json: str,
        rank: int,
        node: str,
        silence_s: float,
        *,
        on_stop: Callable[[], None],
        on_terminate: Callable[[bool], None],
        describe_activity: Callable[[], str],
        on_extension: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Connect to the server's `address_json`.

        Raises OSError where it cannot be reached, or does not know the address's token.
        """
        address = msgspec.json.decode(address_json, type=Address)
        self._on_stop, self._on_terminate, self._on_extension = on_stop, on_terminate, on_extension
        self._describe_activity = describe_activity
        self._closed = False
        self._send_lock = threading.Lock()
        self._socket = connect_authenticated(address)
        self._lines = self._socket.makefile("rb")
        keep_alive(self._socket, silence_s)
        self.send(Hello(rank, os.getpid(), node, output_file()))
        threading.Thread(target=self._handle_commands, daemon=True, name="RayAscendControlClient").start()
        exit_sentinel.start_sentinels(address, rank, silence_s)

    def send(self, message: Message) -> None:
        """Send a message, from any thread. That the owner is gone is detected by the thread that reads."""
        with self._send_lock, contextlib.suppress(OSError):
            self._socket.sendall(encode_message(message))

    def report_failure(self, error: BaseException, explanation: str | None = None) -> None:
        """Report to the owner that this process cannot continue, why, and what that means where it is known."""
        text = f"{type(error).__name__}: {error}"
        self.send(Failed(f"{text}\n{explanation}" if explanation else text))

    def close(self) -> None:
        """Close the connection, by which the owner knows that this process is done and need not be waited for."""
        self._closed = True
        shut_down(self._socket)

    def _handle_commands(self) -> None:
        try:
            self._handle_orders()
        except Exception as error:  # whatever it is: this process would obey no order any more, and nobody would know
            logger.exception("VRA-332: the control connection of this process failed, and ends it")
            self.report_failure(error)
            self._on_terminate(False)

    def _handle_orders(self) -> None:
        while True:
            command = self._receive_command()
            if self._closed:
                return
            if command == REQUEST_STATUS:
                self._report_status()
            elif isinstance(command, Extension):
                self._on_extension(command.name)
            elif command == STOP:
                self._on_stop()
            else:
                if command == TERMINATE:  # the owner keeps it with the record of the failure
                    self._report_status()
                self._on_terminate(command != TERMINATE)
                return

    def _report_status(self) -> None:
        stack = format_stack(threading.main_thread().ident)
        self.send(StatusReport(f"{self._describe_activity()}, at {stack}"))

    def _receive_command(self) -> Message | None:
        """Return the server's next message; None where the server is gone, or no longer speaks this protocol."""
        try:
            return decode_message(self._lines.readline(MAX_LINE_BYTES))
        except OSError:
            return None


def server_location(address_json: str) -> str:
    """Return host and port of a server's address, without the token, which must not be logged."""
    return str(msgspec.json.decode(address_json, type=Address))


def format_stack(ident: int | None) -> str:
    """Return the innermost frames of a thread, outermost first.

    The thread runs on meanwhile. So only these frames are touched, in a loop that lasts microseconds: Python 3.11 has
    been seen to return what is no frame where `traceback.extract_stack` had read source files in between.
    """
    frame = sys._current_frames().get(ident) if ident is not None else None
    stack: list[tuple[CodeType, int | None]] = []
    try:
        while frame is not None and len(stack) < _FRAMES:
            stack.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
    except AttributeError:  # no frame, as above: those before it are right
        pass
    return " > ".join(f"{code.co_filename.rpartition('/')[2]}:{line} {code.co_name}" for code, line in reversed(stack))
