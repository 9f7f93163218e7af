"""Idle workers are asked for their status: real processes, real signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.unit.test_control import LIMIT_S, Losses, send_code, start, suspend, wait_for_ranks  # noqa: F401
from vllm_ray_ascend.control.health_check import IdleHealthCheck, Reports
from vllm_ray_ascend.control.server import ControlServer

pytestmark = pytest.mark.unit

CHECK_S = 0.5


@pytest.fixture
def losses() -> Losses:
    return Losses()


@pytest.fixture
def server(losses: Losses) -> Iterator[ControlServer]:
    server = ControlServer("127.0.0.1", 30.0, losses)
    yield server
    server.close()


class Watched:
    """A health check over a server, which counts its requests."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._requested = threading.Semaphore(0)
        self._silent = threading.Event()
        self.reports: Reports = {}
        self.health_check = IdleHealthCheck(self._request_reports, CHECK_S, self._on_silent)
        self.health_check.start()

    def _request_reports(self, limit_s: float) -> Reports:
        reports = self._server.request_reports(limit_s)
        self._requested.release()
        return reports

    def _on_silent(self, reports: Reports) -> None:
        self.reports = reports
        self._silent.set()

    def wait_for_requests(self, times: int) -> None:
        for _ in range(times):
            assert self._requested.acquire(timeout=LIMIT_S)

    def wait_for_silence(self) -> None:
        assert self._silent.wait(LIMIT_S)

    @property
    def detected(self) -> bool:
        return self._silent.is_set()


@pytest.fixture
def watched(server: ControlServer) -> Iterator[Watched]:
    watched = Watched(server)
    yield watched
    watched.health_check.stop()


def test_a_suspended_worker_is_detected_and_named(server: ControlServer, start: Any, watched: Watched) -> None:  # noqa: F811
    workers = [start(0), start(1)]
    wait_for_ranks(server, [0, 1])
    watched.wait_for_requests(2)
    assert not watched.detected
    suspend(workers[1])
    watched.wait_for_silence()
    assert watched.reports[1] is None and "testing" in str(watched.reports[0])


def test_no_worker_is_asked_while_a_call_is_under_way(server: ControlServer, start: Any, watched: Watched) -> None:  # noqa: F811
    """Nor after one that failed here, and may still run there, until a later one has completed."""
    worker = start(0)
    wait_for_ranks(server, [0])
    step: Future[None] = Future()
    assert watched.health_check.track(lambda: step) is step
    suspend(worker)
    assert not watched._silent.wait(4 * CHECK_S)
    step.set_exception(TimeoutError())
    assert not watched._silent.wait(4 * CHECK_S)
    assert watched.health_check.track(lambda: "result") == "result"
    watched.wait_for_silence()


def test_a_step_raises_the_failure_that_its_error_follows_from() -> None:
    health_check = IdleHealthCheck(lambda _: {}, CHECK_S, lambda reports: None)
    first, late = ConnectionError("the first"), TimeoutError("late")
    for found, expected in ((first, first), (None, late), (late, late)):
        step: Future[None] = Future()
        health_check.track(lambda step=step: step, lambda _, found=found: found)  # type: ignore[misc]
        step.set_exception(late)
        with pytest.raises(type(expected)) as raised:
            step.result()
        assert raised.value is expected


def test_a_worker_that_answers_the_second_request_does_not_hang() -> None:
    """As after the whole machine was suspended, when the time of the first request is over at once."""
    requested = threading.Semaphore(0)
    answers: Iterator[Reports] = iter([{0: None}, {0: "here"}])
    detected = threading.Event()

    def request_reports(_: float) -> Reports:
        requested.release()
        return next(answers, {0: "here"})

    health_check = IdleHealthCheck(request_reports, CHECK_S, lambda reports: detected.set())
    health_check.start()
    for _ in range(4):
        assert requested.acquire(timeout=LIMIT_S)
    health_check.stop()
    assert not detected.is_set()


def test_a_worker_that_dies_is_not_waited_for(
    server: ControlServer,
    losses: Losses,
    start: Any,  # noqa: F811
    watched: Watched,
) -> None:
    """Its death is detected by the server; the health check continues with the others."""
    workers = [start(0), start(1)]
    wait_for_ranks(server, [0, 1])
    suspend(workers[1])
    request = threading.Thread(target=server.request_reports, args=(LIMIT_S * 10,), daemon=True)
    request.start()
    workers[1].send_signal(signal.SIGKILL)
    losses.wait(1)
    request.join(LIMIT_S)
    assert not request.is_alive()
    send_code(workers[0], "print('lives', flush=True)")
    assert workers[0].stdout is not None and workers[0].stdout.readline() == "lives\n"
