"""Workers without work are asked for their status from time to time: a stopped process keeps its connections open.

While a call of the workers is in progress they are not asked: the call has a limit of its own, or none on purpose, and
may keep the interpreter busy for as long as it takes (loading a model, capturing graphs).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

Reports = Mapping[int, str | None]
"""The status of each rank; None for a rank that did not answer."""


class IdleHealthCheck:
    """Detects workers that have no work and do not answer.

    ``request_reports(limit_s)`` returns the status of each worker, waiting at most ``limit_s`` seconds. ``on_silent``
    is called once, in the thread of this check, with all reports where a worker did not answer.
    """

    def __init__(
        self, request_reports: Callable[[float], Reports], limit_s: float, on_silent: Callable[[Reports], None]
    ) -> None:
        """``limit_s``: seconds within which an idle worker that does not answer is detected."""
        self._request_reports = request_reports
        self._limit_s = limit_s
        self._on_silent = on_silent
        self._count_lock = threading.Lock()
        self._calls_started = self._calls_completed = 0
        self.last_completion_at = time.monotonic()
        """When the last call of the workers completed: a sign of life of each of them."""
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the check in a thread of its own."""
        threading.Thread(target=self._run_checks, daemon=True, name="RayAscendHealthCheck").start()

    def stop(self) -> None:
        """Stop the check. May be called in any thread, and again."""
        self._stopped.set()

    def track(
        self, call: Callable[[], Any], on_error: Callable[[BaseException], BaseException | None] | None = None
    ) -> Any:
        """Return the result of ``call``, which uses the workers. They count as busy until it has completed.

        A call that returns a Future has completed with the Future, whose error ``on_error`` is called with; the Future
        raises what that returns, unless it is None. A call that failed here, as after a timeout, may still run in the
        workers, which process calls in order: it counts as completed once a later call has.
        """
        with self._count_lock:
            self._calls_started = number = self._calls_started + 1
        result = call()
        if not isinstance(result, Future):
            self._record_completion(number)
            return result

        def handle_done(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                self._record_completion(number)
            elif on_error is not None:
                done._exception = on_error(error) or error  # its own may only follow from the first failure

        result.add_done_callback(handle_done)
        return result

    def _record_completion(self, number: int) -> None:
        with self._count_lock:
            self._calls_completed = max(self._calls_completed, number)
            self.last_completion_at = time.monotonic()

    def _run_checks(self) -> None:
        # Asked twice: where this very process, or the whole machine, was stopped, the first request's time is over
        # before anybody could answer.
        interval_s, first_limit_s, second_limit_s = 0.5 * self._limit_s, 0.4 * self._limit_s, 0.1 * self._limit_s
        while not self._stopped.wait(interval_s):
            calls_before = self._completed_calls_when_idle()
            if calls_before is None or not _any_silent(self._request_reports(first_limit_s)):
                continue
            reports = self._request_reports(second_limit_s)
            still_idle = self._completed_calls_when_idle() == calls_before
            if _any_silent(reports) and still_idle and not self._stopped.is_set():
                self._on_silent(reports)
                return

    def _completed_calls_when_idle(self) -> int | None:
        """Return the number of completed calls; None while one is in progress."""
        with self._count_lock:
            return self._calls_completed if self._calls_started == self._calls_completed else None


def _any_silent(reports: Reports) -> bool:
    return None in reports.values()
