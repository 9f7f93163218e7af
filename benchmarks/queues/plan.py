"""What one run measures, and the order in which writer and readers do it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

KIB, MIB = 1 << 10, 1 << 20
SLOW_S = 0.05
"""What the slow reader sleeps before each message."""
_BYTES_A_TURN = 256 * MIB
_LEAST_COUNT, _MOST_COUNT = 5, 100


@dataclasses.dataclass(frozen=True)
class Options:
    """``slow``: whether there is one slow reader among them."""

    ways: tuple[str, ...] = ("blocking", "pending", "zeromq")
    readers: tuple[int, ...] = (1, 8, 64)
    sizes: tuple[int, ...] = (KIB, 16 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
    slow: tuple[bool, ...] = (False, True)
    rounds: int = 3
    name: str = "queues"


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of processes. Reader 0 is the slow one, if any."""

    ways: tuple[str, ...]
    readers: int
    slow: bool
    sizes: tuple[int, ...]
    rounds: int

    def turns(self) -> Iterator[tuple[int, int, str]]:
        """Return round, size and way of each turn, in order: the ways take turns, seconds apart."""
        for number in range(self.rounds):
            for size in self.sizes:
                first = number % len(self.ways)
                for way in self.ways[first:] + self.ways[:first]:
                    yield number, size, way

    def count_of(self, size: int) -> int:
        """Return the messages of one turn."""
        return max(_LEAST_COUNT, min(_MOST_COUNT, _BYTES_A_TURN // (size * self.readers)))

    def messages_of_a_way(self) -> int:
        """Return the messages that each reader gets."""
        return self.rounds * sum(map(self.count_of, self.sizes))


def cases_of(options: Options) -> list[Case]:
    """Return the cases of a run. A slow reader alone delays nobody."""
    return [
        Case(options.ways, readers, slow, options.sizes, options.rounds)
        for readers in options.readers
        for slow in options.slow
        if readers > 1 or not slow
    ]


def read_options(arguments: Sequence[str]) -> Options:
    """Parse the command line. --quick is a smoke run."""
    default = Options()
    if "--quick" in arguments:
        default = Options(readers=(2,), sizes=(KIB, MIB), rounds=1, name="queues-quick")
    parser = argparse.ArgumentParser(prog="make bench-queues")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ways", nargs="+", default=default.ways, choices=Options.ways)
    parser.add_argument("--readers", nargs="+", type=int, default=default.readers)
    parser.add_argument("--sizes", nargs="+", type=int, default=default.sizes, help="bytes of a message")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--name", default=default.name)
    found = parser.parse_args(arguments)
    return Options(tuple(found.ways), tuple(found.readers), tuple(found.sizes), default.slow, found.rounds, found.name)
