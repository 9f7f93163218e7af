"""A process with many simulated ranks: each has the three connections of a real one, and answers as a real one does.

Reads commands from standard input: `connect`, `die RANK`. Writes a line of JSON once it has started, and for each
command.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import msgspec

from vllm_ray_ascend.control.protocol import (
    REQUEST_STATUS,
    STOP,
    DeviceOpened,
    Hello,
    PhaseStarted,
    SentinelHello,
    StatusReport,
    decode_message,
    encode_message,
)
from vllm_ray_ascend.ipc.authentication import connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address, keep_alive

_THREADS = 16
_FRAMES = " > ".join(f"module{number}.py:{100 + number} function_{number}" for number in range(6))
_REPORT = encode_message(StatusReport(f"in execute_model for 0.1 s, at {_FRAMES}"))


class Rank:
    """One rank. ``connections`` are its control connection and its two exit sentinels."""

    def __init__(self, address: Address, rank: int) -> None:
        self.rank = rank
        pid = 100_000 + rank
        hello = Hello(rank, pid, f"10.0.{rank // 8 // 250}.{rank // 8 % 250}")
        self.connections: list[socket.socket] = []
        for first in (hello, SentinelHello(rank, pid), SentinelHello(rank, pid)):
            self.connections.append(connect_authenticated(address, 60.0))
            keep_alive(self.connections[-1], 30.0)
            self.connections[-1].sendall(encode_message(first))
        for message in (DeviceOpened(rank % 8), PhaseStarted("model"), PhaseStarted("")):
            self.connections[0].sendall(encode_message(message))

    def close(self) -> None:
        """End as a process that is killed: its exit sentinels first."""
        for connection in self.connections[::-1]:
            connection.close()
        self.connections = []


class Ranks:
    """All ranks of this process."""

    def __init__(self, address: Address, numbers: range) -> None:
        self._address = address
        self._numbers = numbers
        self._ranks: dict[int, Rank] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, commands: TextIO) -> None:
        """Carry out commands, and answer the server, until the commands end."""
        self._selector.register(commands, selectors.EVENT_READ)
        _say({"started_at": time.monotonic()})
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._answer(key.data)
                elif not self._obey(commands.readline()):
                    return

    def _obey(self, command: str) -> bool:
        name, _, rank = command.strip().partition(" ")
        if name == "connect":
            started = time.monotonic()
            with ThreadPoolExecutor(_THREADS) as pool:
                self._ranks = {rank.rank: rank for rank in pool.map(lambda n: Rank(self._address, n), self._numbers)}
            for each in self._ranks.values():
                self._selector.register(each.connections[0], selectors.EVENT_READ, each)
            _say({"seconds": time.monotonic() - started})
        elif name == "die":
            died = self._ranks.pop(int(rank))
            self._selector.unregister(died.connections[0])
            died_at = time.monotonic()
            died.close()
            _say({"died_at": died_at})
        return bool(command)

    def _answer(self, rank: Rank) -> None:
        lines = rank.connections[0].recv(65536).splitlines()
        if not lines or decode_message(lines[-1]) == STOP:
            self._selector.unregister(rank.connections[0])
            self._ranks.pop(rank.rank, None)
            rank.close()
        else:
            rank.connections[0].sendall(_REPORT * [decode_message(line) for line in lines].count(REQUEST_STATUS))


def _say(answer: dict[str, float]) -> None:
    print(json.dumps(answer), flush=True)


def main(address_json: str, first: int, count: int) -> None:
    """Be the ranks from ``first`` on."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address = msgspec.json.decode(address_json, type=Address)
    Ranks(address, range(first, first + count)).run(sys.stdin)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
