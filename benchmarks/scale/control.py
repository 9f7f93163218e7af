"""The real supervisor and control server with simulated ranks: connecting, asking, deaths, stopping."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_ray_ascend.control.protocol import STOP
from vllm_ray_ascend.control.server import ControlServer, PeerLost
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.settings import Settings

PROCESSES = 4
_COMMAND = (sys.executable, "-m", "benchmarks.scale.clients")
_LIMIT_S = 300.0
_POLL_S = 0.005
_ASKS = 5
_PAUSE_S = 0.01


class Clients:
    """The processes of the simulated ranks."""

    def __init__(self, address_json: str, ranks: int) -> None:
        self._per_process = -(-ranks // PROCESSES)
        firsts = range(0, ranks, self._per_process)
        self._processes = [
            subprocess.Popen(
                [*_COMMAND, address_json, str(first), str(min(self._per_process, ranks - first))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for first in firsts
        ]
        for process in self._processes:
            _answer(process)

    def connect(self) -> None:
        """Have all ranks connect at once."""
        for process in self._processes:
            _order(process, "connect")

    def connected(self) -> float:
        """Return the seconds that the slowest process has taken."""
        return max(_answer(process)["seconds"] for process in self._processes)

    def kill(self, rank: int) -> float:
        """End a rank; return when its connections were closed, on the clock of time.monotonic()."""
        process = self._processes[rank // self._per_process]
        _order(process, f"die {rank}")
        return float(_answer(process)["died_at"])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


def _order(process: subprocess.Popen[str], command: str) -> None:
    assert process.stdin is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


class Engine:
    """A supervisor as the executor has it, which notes when it hears of a death."""

    def __init__(self, ranks: int) -> None:
        self.noticed: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self.failed_at = 0.0
        self.supervisor = WorkerSupervisor(list, Settings(), 240.0, processes=ranks, on_failure=self._note_failure)
        self.address_json = self.supervisor.control_address()
        server = self.supervisor._server
        assert server is not None
        self.server: ControlServer = server
        self._handle_loss = server._on_peer_lost
        server._on_peer_lost = self._note_loss

    def _note_loss(self, loss: PeerLost) -> None:
        self.noticed.put((loss.rank, time.monotonic()))
        self._handle_loss(loss)

    def _note_failure(self, _: Exception) -> None:
        self.failed_at = time.monotonic()


def measure_control(ranks: int, deaths: int) -> dict[str, Any]:
    """Return what the control connections of an engine with so many ranks cost, in seconds."""
    with _engine(ranks) as (engine, clients):
        found: dict[str, Any] = dict(_connect(engine, clients, ranks))
        found |= _ask(engine, ranks)
        found |= _lose(engine, clients, random.Random(ranks).sample(range(ranks), min(deaths, max(1, ranks // 2))))
        started = time.monotonic()
        engine.server.broadcast(STOP)
        late = engine.server.wait_for_exit(_LIMIT_S)
        return {**found, "stop": time.monotonic() - started, "late_at_stop": len(late)}


def _connect(engine: Engine, clients: Clients, ranks: int) -> dict[str, float]:
    started = time.monotonic()
    clients.connect()
    _wait_until(lambda: len(engine.server._peers) == ranks)
    peers_at = time.monotonic()
    _wait_until(lambda: len(engine.server._sentinels) == 2 * ranks)
    found = {"connect": peers_at - started, "connect_with_sentinels": time.monotonic() - started}
    clients.connected()
    return found


def _ask(engine: Engine, ranks: int) -> dict[str, Any]:
    seconds, silent = [], 0
    for _ in range(_ASKS):
        started = time.monotonic()
        reports = engine.supervisor.request_reports(_LIMIT_S)
        seconds.append(time.monotonic() - started)
        silent += ranks - sum(report is not None for report in reports.values())
    return {"ask": sorted(seconds)[_ASKS // 2], "ask_longest": max(seconds), "silent": silent}


def _lose(engine: Engine, clients: Clients, victims: list[int]) -> dict[str, Any]:
    seconds = []
    for victim in victims:
        died_at = clients.kill(victim)
        rank, noticed_at = engine.noticed.get(timeout=_LIMIT_S)
        assert rank == victim
        seconds.append(noticed_at - died_at)
        if len(seconds) == 1:
            first_died_at = died_at
        time.sleep(_PAUSE_S)
    seconds.sort()
    return {
        "death": seconds[len(seconds) // 2],
        "death_p99": seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)],
        "death_to_callback": engine.failed_at - first_died_at,
        "deaths": len(seconds),
    }


@contextlib.contextmanager
def _engine(ranks: int) -> Iterator[tuple[Engine, Clients]]:
    engine = Engine(ranks)
    clients = Clients(engine.address_json, ranks)
    try:
        yield engine, clients
    finally:
        clients.close()
        engine.server.close()


def _wait_until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError("the ranks did not connect")
        time.sleep(_POLL_S)
