"""Idle workers are asked whether they live: real processes, real signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.unit.test_lifeline import LIMIT_S, Deaths, say, start, stop, wait_for_ranks  # noqa: F401
from vllm_ray_ascend.lifecycle.hub import Hub
from vllm_ray_ascend.lifecycle.pulse import Pulse, Reports

pytestmark = pytest.mark.unit

PULSE_S = 0.5


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture
def hub(deaths: Deaths) -> Iterator[Hub]:
    hub = Hub("127.0.0.1", 30.0, deaths)
    yield hub
    hub.close()


class Watched:
    """A pulse over a hub, which counts what it asks."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._asked = threading.Semaphore(0)
        self._silent = threading.Event()
        self.reports: Reports = {}
        self.pulse = Pulse(self._ask, PULSE_S, self._on_silent)
        self.pulse.start()

    def _ask(self, limit_s: float) -> Reports:
        answers = self._hub.ask(limit_s)
        self._asked.release()
        return answers

    def _on_silent(self, reports: Reports) -> None:
        self.reports = reports
        self._silent.set()

    def wait_until_asked(self, times: int) -> None:
        for _ in range(times):
            assert self._asked.acquire(timeout=LIMIT_S)

    def wait_until_silent(self) -> None:
        assert self._silent.wait(LIMIT_S)

    @property
    def told(self) -> bool:
        return self._silent.is_set()


@pytest.fixture
def watched(hub: Hub) -> Iterator[Watched]:
    watched = Watched(hub)
    yield watched
    watched.pulse.stop()


def test_a_stopped_worker_is_found_and_named(hub: Hub, start: Any, watched: Watched) -> None:  # noqa: F811
    workers = [start(0), start(1)]
    wait_for_ranks(hub, [0, 1])
    watched.wait_until_asked(2)
    assert not watched.told
    stop(workers[1])
    watched.wait_until_silent()
    assert watched.reports[1] is None and "testing" in str(watched.reports[0])


def test_nobody_is_asked_while_a_call_is_under_way(hub: Hub, start: Any, watched: Watched) -> None:  # noqa: F811
    """Nor after one that failed here, and may go on there, until a later one is answered."""
    worker = start(0)
    wait_for_ranks(hub, [0])
    step: Future[None] = Future()
    assert watched.pulse.during(lambda: step) is step
    stop(worker)
    assert not watched._silent.wait(4 * PULSE_S)
    step.set_exception(TimeoutError())
    assert not watched._silent.wait(4 * PULSE_S)
    assert watched.pulse.during(lambda: "answer") == "answer"
    watched.wait_until_silent()


def test_who_answers_the_second_question_is_no_hung_worker() -> None:
    """As after the whole machine was stopped, when the first one's time is over at once."""
    asked = threading.Semaphore(0)
    answers: Iterator[Reports] = iter([{0: None}, {0: "here"}])
    told = threading.Event()

    def ask(_: float) -> Reports:
        asked.release()
        return next(answers, {0: "here"})

    pulse = Pulse(ask, PULSE_S, lambda reports: told.set())
    pulse.start()
    for _ in range(4):
        assert asked.acquire(timeout=LIMIT_S)
    pulse.stop()
    assert not told.is_set()


def test_a_worker_that_dies_is_not_waited_for(hub: Hub, deaths: Deaths, start: Any, watched: Watched) -> None:  # noqa: F811
    """Its death is told by the hub; the pulse goes on with the others."""
    workers = [start(0), start(1)]
    wait_for_ranks(hub, [0, 1])
    stop(workers[1])
    asking = threading.Thread(target=hub.ask, args=(LIMIT_S * 10,), daemon=True)
    asking.start()
    workers[1].send_signal(signal.SIGKILL)
    deaths.wait(1)
    asking.join(LIMIT_S)
    assert not asking.is_alive()
    say(workers[0], "print('lives', flush=True)")
    assert workers[0].stdout is not None and workers[0].stdout.readline() == "lives\n"
