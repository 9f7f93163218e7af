"""Workers that have nothing to do are asked now and then whether they live: a stopped process keeps its connections.

While a call of them is under way they are not asked: it has a limit of its own, or none on purpose, and may keep the
interpreter busy for as long as it takes (a model that is loaded, graphs that are captured).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

Reports = Mapping[int, str | None]


class Pulse:
    """``ask(limit)`` gives what each worker says within ``limit`` seconds, None where it says nothing. ``on_silent`` is
    called in the pulse's thread, once, with what all said when one was silent."""

    def __init__(self, ask: Callable[[float], Reports], limit_s: float, on_silent: Callable[[Reports], None]) -> None:
        """A worker without work that says nothing is found within ``limit_s`` seconds."""
        self._ask = ask
        self._limit_s = limit_s
        self._on_silent = on_silent
        self._counting = threading.Lock()
        self._begun = self._ended = 0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Ask from now on."""
        threading.Thread(target=self._run, daemon=True, name="RayAscendPulse").start()

    def stop(self) -> None:
        """Ask no more. May be called in any thread, and again."""
        self._stopped.set()

    def during(self, call: Callable[[], Any]) -> Any:
        """What ``call`` of the workers gives. It is under way until its answer is there, or that of a later one:
        workers do one after the other, and one that failed here, for want of time, may go on there."""
        with self._counting:
            self._begun = number = self._begun + 1
        answer = call()
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: None if done.exception() else self._over(number))
        else:
            self._over(number)
        return answer

    def _over(self, number: int) -> None:
        with self._counting:
            self._ended = max(self._ended, number)

    def _run(self) -> None:
        # Asked twice: where this very process was stopped, or the whole machine, the first time says nothing.
        rest, patience, again = 0.5 * self._limit_s, 0.4 * self._limit_s, 0.1 * self._limit_s
        while not self._stopped.wait(rest):
            before = self._idle_since()
            if before is None or not _anyone_silent(self._ask(patience)):
                continue
            reports = self._ask(again)
            if _anyone_silent(reports) and self._idle_since() == before and not self._stopped.is_set():
                self._on_silent(reports)
                return

    def _idle_since(self) -> int | None:
        """After how many calls there is no work now; None where there is."""
        with self._counting:
            return self._begun if self._begun == self._ended else None


def _anyone_silent(reports: Reports) -> bool:
    return None in reports.values()
