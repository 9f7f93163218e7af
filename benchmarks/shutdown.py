"""The end of an executor, timed: on request, or because a worker died."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

_LIMIT_S = 60.0
_BUSY_S = 0.2
"""A worker is killed after this time of calls without a pause, as it is under an engine that serves."""


class Processes:
    """Processes of this node whose exit is awaited, also before their parent has reaped them."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._descriptors = {os.pidfd_open(pid): pid for pid in pids}

    def wait_for_exit(self, limit_s: float) -> float | None:
        """Return the time at which the last of them exited; None if one had not after ``limit_s`` seconds."""
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        waiting = set(self._descriptors)
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        gone = time.monotonic()
        while waiting and time.monotonic() < deadline:
            for descriptor, _ in poll.poll(max(1, int((deadline - time.monotonic()) * 1000))):
                poll.unregister(descriptor)
                waiting.discard(descriptor)
                gone = time.monotonic()
        return None if waiting else gone

    def close(self) -> None:
        """Forget the watched processes."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def time_shutdown(executor: Any, pids: Sequence[int]) -> dict[str, float | None]:
    """Shut the executor down. Returns seconds until shutdown() returned ("call") and ``pids`` had exited ("gone").

    None: not within a minute.
    """
    with _watch_processes(pids) as processes:
        begun, ended = time.monotonic(), [0.0]

        def shut_down() -> None:
            executor.shutdown()
            ended[0] = time.monotonic()

        thread = threading.Thread(target=shut_down)
        thread.start()
        gone = processes.wait_for_exit(_LIMIT_S)
        thread.join()
    return {"call": ended[0] - begun, "gone": None if gone is None else gone - begun}


def time_worker_death(executor: Any, pids: Sequence[int], rank: int) -> dict[str, float | None]:
    """Kill a busy worker. Returns seconds until the failure callback ran ("callback") and all had exited ("gone").

    None: not within a minute.
    """
    called = threading.Event()
    at = [0.0]

    def callback() -> None:
        at[0] = time.monotonic()
        called.set()

    executor.register_failure_callback(callback)
    with _watch_processes(pids) as processes:
        threading.Thread(target=_call_until_it_fails, args=(executor,), daemon=True).start()
        time.sleep(_BUSY_S)
        killed = time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        was_called = called.wait(_LIMIT_S)
        gone = processes.wait_for_exit(_LIMIT_S)
    executor.shutdown()
    return {
        "callback": at[0] - killed if was_called else None,
        "gone": None if gone is None else max(gone, killed) - killed,
    }


@contextlib.contextmanager
def _watch_processes(pids: Sequence[int]) -> Iterator[Processes]:
    processes = Processes(pids)
    try:
        yield processes
    finally:
        processes.close()


def _call_until_it_fails(executor: Any) -> None:
    with contextlib.suppress(Exception):
        while True:
            executor.collective_rpc("bench_nothing")
