"""What one run measures, and which figures it is to reach."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks.statistics import Goal

EXECUTORS = ("mp", "upstream", "ours")
"""As in benchmarks.options; on two nodes mp is one `vllm serve` for each node."""
VLLM, AIPERF = "vllm bench", "aiperf"


@dataclasses.dataclass(frozen=True)
class Case:
    """How an engine is laid out: each node has its part of the pipeline, or its data parallel rank."""

    name: str
    tp: int
    pp: int = 1
    dp: int = 1
    nodes: int = 1

    @property
    def npus_per_node(self) -> int:
        """NPUs of each node."""
        return self.tp * self.pp * self.dp // self.nodes


CASES = {
    case.name: case
    for case in (
        Case("tp2", tp=2),
        Case("tp2-pp2-two-nodes", tp=2, pp=2, nodes=2),
        Case("dp2-two-nodes", tp=1, dp=2, nodes=2),
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """``rates``: requests a second; ``requests``: of one measurement, each of ``tokens``; ``aiperf``: the program."""

    cases: tuple[str, ...] = tuple(CASES)
    executors: tuple[str, ...] = EXECUTORS
    rates: tuple[float, ...] = (1.0, 4.0)
    requests: int = 20
    tokens: int = 32
    rounds: int = 6
    aiperf: str = ""
    name: str = "served"

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that measure."""
        return (VLLM, AIPERF) if self.aiperf else (VLLM,)


def metric(name: str, client: str, rate: float) -> str:
    """Return the name of what ``client`` measured at ``rate``."""
    return f"{name}, {rate:g} requests/s, {client}"


def goals(options: Options) -> list[Goal]:
    """Return what ours is to reach."""
    return [
        Goal(case, metric("time per token", client, rate), 1.02)
        for case in options.cases
        for client in options.clients
        for rate in options.rates
    ]


def read_options(arguments: Sequence[str]) -> Options:
    """Parse the command line."""
    default = Options()
    parser = argparse.ArgumentParser(prog="make bench-served", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default.cases)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=default.executors)
    parser.add_argument("--rates", nargs="+", type=float, default=default.rates, help="requests a second")
    parser.add_argument("--requests", type=int, default=default.requests, help="of one measurement")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of each answer")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="each visits every executor")
    parser.add_argument("--aiperf", default="", metavar="PROGRAM", help="measure with this client, too")
    parser.add_argument("--name", default=default.name, help="of the files in benchmarks/results")
    given = vars(parser.parse_args(arguments))
    if given["tokens"] < 2:
        parser.error("--tokens: a time per token needs 2 or more")
    for name in ("cases", "executors", "rates"):
        given[name] = tuple(dict.fromkeys(given[name]))
    return Options(**given)
