"""The connection between executor and workers: real processes, real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_ray_ascend.lifecycle.hub import Hub, Loss
from vllm_ray_ascend.lifecycle.messages import DIE, READ, STOP

pytestmark = pytest.mark.unit

LIMIT_S = 30.0
WORKER = """
import os, sys, time
from vllm_ray_ascend.lifecycle.lifeline import Lifeline
from vllm_ray_ascend.lifecycle.messages import Doing, HasRead, Holds, Segment
def stop():
    print("stop", flush=True)
    os._exit(7)
def end(lost):
    os._exit(8 if lost else 9)
pipe = os.pipe()
line = Lifeline(sys.argv[1], int(sys.argv[2]), "10.0.0.9", 30.0, on_stop=stop, on_end=end, activity=lambda: "testing",
    on_read=lambda: print("read", flush=True))
print("connected", flush=True)
for command in sys.stdin:
    exec(command)
time.sleep(600)
"""


class Deaths:
    def __init__(self) -> None:
        self.seen: list[Loss] = []
        self._changed = threading.Condition()

    def __call__(self, loss: Loss) -> None:
        with self._changed:
            self.seen.append(loss)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Loss]:
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

    def start(rank: int, first: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", first + WORKER, hub.text(), str(rank)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "connected\n"
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def say(worker: subprocess.Popen[str], command: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(command + "\n")
    worker.stdin.flush()


def wait_for(check: Callable[[], bool]) -> None:
    for _ in range(int(LIMIT_S * 100)):
        if check():
            return
        threading.Event().wait(0.01)
    assert check()


def stop(worker: subprocess.Popen[str]) -> None:
    """SIGSTOP, waited for: until some thread has taken the signal, the others run on."""
    worker.send_signal(signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in Path(f"/proc/{worker.pid}/status").read_text())


def wait_for_ranks(hub: Hub, expected: list[int]) -> None:
    wait_for(lambda: hub.ranks() == expected)
    assert hub.ranks() == expected


def test_what_a_worker_holds_is_told_when_it_dies(hub: Hub, deaths: Deaths, start: Any) -> None:
    worker = start(2)
    wait_for_ranks(hub, [2])
    say(worker, "line.tell(Holds(5)); line.tell(Segment('psm_x'))")
    wait_for(lambda: hub.peers()[0].segments == ["psm_x"])
    worker.kill()
    assert deaths.wait(1) == [Loss(2, worker.pid, "node 10.0.0.9, physical NPU 5", "", ("psm_x",))]


def test_a_failure_is_told_once_with_its_words_and_the_process_lives(hub: Hub, deaths: Deaths, start: Any) -> None:
    worker = start(0)
    wait_for_ranks(hub, [0])
    say(worker, "line.fail(ValueError('a'), 'means b'); line.fail(ValueError('c')); line.tell(Doing('c'))")
    wait_for(lambda: hub.peers()[0].doing == "c")
    assert deaths.seen == [Loss(0, worker.pid, "node 10.0.0.9", "ValueError: a\nmeans b")]


def test_parts_of_a_start_are_timed(hub: Hub, start: Any) -> None:
    worker = start(0)
    wait_for_ranks(hub, [0])
    for part in ("one", "two", ""):
        say(worker, f"line.tell(Doing({part!r}))")
    wait_for(lambda: list(hub.peers()[0].spent) == ["one", "two"])
    assert all(seconds >= 0 for seconds in hub.peers()[0].spent.values())


def test_workers_say_what_they_do_and_a_stopped_one_does_not(hub: Hub, start: Any) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(hub, [0, 1])
    assert all(report is not None and "testing, at <string>" in report for report in hub.ask(LIMIT_S).values())
    stop(workers[1])
    answers = hub.ask(0.5)
    assert answers[0] is not None and answers[1] is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_death_is_told_with_rank_and_process(hub: Hub, deaths: Deaths, start: Any, number: signal.Signals) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(hub, [0, 1])
    workers[1].send_signal(number)
    assert deaths.wait(1) == [Loss(1, workers[1].pid, "node 10.0.0.9", "")]
    wait_for_ranks(hub, [0])
    assert len(deaths.seen) == 1


def test_a_death_is_told_though_the_process_s_files_stay_open(hub: Hub, deaths: Deaths, start: Any) -> None:
    """As while the kernel takes it apart: here a child that it forked has copies."""
    worker = start(3)
    wait_for_ranks(hub, [3])
    wait_for(lambda: len(hub._witnesses) == 2)
    say(worker, "child = os.fork() or time.sleep(600); print(child, flush=True)")
    child = int(worker.stdout.readline())
    try:
        worker.kill()
        assert deaths.wait(1) == [Loss(3, worker.pid, "node 10.0.0.9", "")]
        assert hub.wait_until_gone(0.2) == [3]
    finally:
        os.kill(child, signal.SIGKILL)
    assert hub.wait_until_gone(LIMIT_S) == []
    assert len(deaths.seen) == 1


def test_where_a_thread_may_have_no_files_of_its_own_the_lifeline_tells(hub: Hub, deaths: Deaths, start: Any) -> None:
    refused = 0x10000000  # CLONE_NEWUSER, which the kernel gives to no thread of several
    worker = start(0, f"from vllm_ray_ascend.lifecycle import witness; witness._CLONE_FILES = {refused}")
    wait_for_ranks(hub, [0])
    worker.kill()
    assert deaths.wait(1) == [Loss(0, worker.pid, "node 10.0.0.9", "")]
    assert not hub._witnesses


def test_witnesses_wait_whatever_the_process_s_default_of_sockets_is(hub: Hub, deaths: Deaths, start: Any) -> None:
    start(0, "import socket; socket.setdefaulttimeout(0.05)")
    wait_for(lambda: len(hub._witnesses) == 2)
    assert hub.ask(LIMIT_S)[0] is not None
    assert len(hub._witnesses) == 2 and deaths.seen == []


def test_witnesses_hold_no_file_of_their_process(hub: Hub, start: Any) -> None:
    worker = start(0)
    wait_for(lambda: len(hub._witnesses) == 2)
    tables = [len(list((task / "fd").iterdir())) for task in Path(f"/proc/{worker.pid}/task").iterdir()]
    assert sorted(tables)[:3] == [4, 4, 6]


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
    stop(worker)
    hub.order(STOP)
    assert hub.wait_until_gone(0.2) == [4]


def test_workers_end_when_their_executor_is_killed() -> None:
    code = f"""
import subprocess, sys, time
from vllm_ray_ascend.lifecycle.hub import Hub
hub = Hub("127.0.0.1", 30.0, lambda loss: None)
worker = subprocess.Popen(
    [sys.executable, "-c", {WORKER!r}, hub.text(), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
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


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"type":"hello","token":"wrong","rank":0,"pid":1,"node":"n"}\n',
        b'{"type":"failed","text":"t"}\n',
    ],
)
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


def test_who_reads_says_so_and_who_sent_is_told(hub: Hub, start: Callable[[int], subprocess.Popen[str]]) -> None:
    hub.on_read = lambda rank: hub.tell(rank - 1, READ)
    sender, reader = start(0), start(1)
    assert reader.stdin is not None and sender.stdout is not None
    reader.stdin.write("line.tell(HasRead())\n")
    reader.stdin.flush()
    assert sender.stdout.readline() == "read\n"
