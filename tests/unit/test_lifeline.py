"""The connection between executor and workers: real processes, real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_ray_ascend.executor.lifeline import DIE, STOP, Hub

pytestmark = pytest.mark.unit

LIMIT_S = 30.0
WORKER = """
import os, sys, time
from vllm_ray_ascend.executor.lifeline import Lifeline
def stop():
    print("stop", flush=True)
    os._exit(7)
def end(lost):
    os._exit(8 if lost else 9)
Lifeline(sys.argv[1], int(sys.argv[2]), os.getpid(), 30.0, stop, end)
print("connected", flush=True)
time.sleep(600)
"""


class Deaths:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def __call__(self, rank: int, pid: int) -> None:
        with self._changed:
            self.seen.append((rank, pid))
            self._changed.notify_all()

    def wait(self, count: int) -> list[tuple[int, int]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, LIMIT_S)
        return self.seen


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture
def hub(deaths: Deaths) -> Iterator[Hub]:
    hub = Hub("127.0.0.1", 30.0, deaths)
    yield hub
    hub.close()


@pytest.fixture
def start(hub: Hub) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, hub.text(), str(rank)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "connected\n"
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def wait_for_ranks(hub: Hub, expected: list[int]) -> None:
    for _ in range(int(LIMIT_S * 100)):
        if hub.ranks() == expected:
            return
        threading.Event().wait(0.01)
    assert hub.ranks() == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_death_is_told_with_rank_and_process(hub: Hub, deaths: Deaths, start: Any, number: signal.Signals) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(hub, [0, 1])
    workers[1].send_signal(number)
    assert deaths.wait(1) == [(1, workers[1].pid)]
    assert hub.ranks() == [0]


@pytest.mark.parametrize(("order", "code"), [(STOP, 7), (DIE, 9)])
def test_an_order_reaches_every_worker(hub: Hub, start: Any, order: bytes, code: int) -> None:
    workers = [start(0), start(1), start(2)]
    wait_for_ranks(hub, [0, 1, 2])
    hub.order(order)
    assert [worker.wait(LIMIT_S) for worker in workers] == [code] * 3
    assert hub.wait_until_gone(LIMIT_S) == []


def test_a_stopped_process_is_not_gone_and_is_named_as_late(hub: Hub, start: Any) -> None:
    worker = start(4)
    wait_for_ranks(hub, [4])
    worker.send_signal(signal.SIGSTOP)
    hub.order(STOP)
    assert hub.wait_until_gone(0.2) == [4]


def test_workers_end_when_their_executor_is_killed() -> None:
    code = f"""
import subprocess, sys, time
from vllm_ray_ascend.executor.lifeline import Hub
hub = Hub("127.0.0.1", 30.0, lambda rank, pid: None)
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, hub.text(), "0"], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(600)
"""
    executor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert executor.stdout is not None
    pid = int(executor.stdout.readline())
    descriptor = os.pidfd_open(pid)
    try:
        executor.kill()
        executor.communicate()
        import select

        assert select.select([descriptor], [], [], LIMIT_S)[0]
    finally:
        os.close(descriptor)


def test_workers_end_when_the_hub_is_closed(hub: Hub, deaths: Deaths, start: Any) -> None:
    worker = start(0)
    wait_for_ranks(hub, [0])
    hub.close()
    hub.close()
    assert worker.wait(LIMIT_S) == 8
    assert deaths.seen == []


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"token":"wrong","rank":0,"pid":1}'])
def test_strangers_are_sent_away_and_are_nobodys_death(hub: Hub, deaths: Deaths, start: Any, words: bytes) -> None:
    with socket.create_connection((hub.address.host, hub.address.port)) as stranger:
        stranger.settimeout(LIMIT_S)
        stranger.sendall(words)
        if words:
            assert stranger.recv(1) == b""
    start(0)
    wait_for_ranks(hub, [0])
    assert deaths.seen == []


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        text = f'{{"host":"127.0.0.1","port":{unused.getsockname()[1]},"token":"t"}}'
        done = subprocess.run(
            [sys.executable, "-c", WORKER, text, "0"], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    assert "ConnectionRefusedError" in done.stderr
