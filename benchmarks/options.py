"""What one run of the benchmarks measures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.statistics import Goal

RESULTS = Path(__file__).parent / "results"
EXECUTORS = ("mp", "upstream", "ours", "mp-fork", "compiled_graph", "upstream-graph")
"""vLLM's multiprocessing executor as `vllm serve` has it (workers are spawned), which every ratio is over; vLLM's
RayExecutorV2; RayAscendExecutor; mp as LLM() has it: forked workers inherit what their parent has imported; our
compiled-graph executor; and vLLM's own (up to 0.32), whose tensors go through host memory."""
BASE = "mp"


class BenchError(RuntimeError):
    """A run that cannot continue, or whose figures would be misleading."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How an engine is laid out. ``tcp``: its workers are on another node than it is (mp's cannot be)."""

    name: str
    tp: int
    pp: int
    tcp: bool = False

    @property
    def world_size(self) -> int:
        """Workers of one engine."""
        return self.tp * self.pp


CASES = {
    case.name: case
    for case in (
        Case("tp1", 1, 1),
        Case("tp2", 2, 1),
        Case("pp2", 1, 2),
        Case("tp2-tcp", 2, 1, tcp=True),
        Case("pp2-tcp", 1, 2, tcp=True),
    )
}
_USUAL = ("tp2", "pp2", "tp2-tcp")


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts are per case and executor."""

    cases: tuple[str, ...] = _USUAL
    executors: tuple[str, ...] = EXECUTORS[:3]
    rounds: int = 12
    starts: int = 4
    deaths: int = 24
    stops: int = 8
    tokens: int = 64
    in_flight: int = 4
    calls: int = 400
    graphs: bool = False
    name: str = "full"

    def quick(self) -> Options:
        """Return the options of a smoke run of a few minutes: it shows whether it works, not how fast it is."""
        few = {"rounds": 2, "starts": 1, "deaths": 1, "stops": 1, "tokens": 16, "calls": 50}
        return dataclasses.replace(self, cases=("tp2",), name="quick", **few)  # type: ignore[arg-type]


def goals(options: Options) -> list[Goal]:
    """Return what ours is to reach."""
    found = []
    for case in options.cases:
        tokens = [f"token, {requests} in flight" for requests in dict.fromkeys((1, options.in_flight))]
        found += [Goal(case, metric, 1.02) for metric in tokens]
        found += [Goal(case, "empty call", 1.00), Goal(case, "empty call, p99", 1.20)]
        found.append(Goal(case, "start without load", 1.00))
    return found


def read_options(arguments: Sequence[str]) -> Options:
    """Parse the command line. --quick gives the defaults that other options replace."""
    quick = "--quick" in arguments
    default = Options().quick() if quick else Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one case, few rounds")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=default.cases, metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=default.executors)
    for name, meaning in _COUNTS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=_count, default=getattr(default, name), metavar="N", help=meaning)
    parser.add_argument("--graphs", action="store_true", help="decode with ACL graphs instead of eagerly")
    parser.add_argument(
        "--name", default=default.name, help="of the files in benchmarks/results (default: %(default)s)"
    )
    given = vars(parser.parse_args(arguments))
    del given["quick"]
    given["cases"], given["executors"] = tuple(dict.fromkeys(given["cases"])), tuple(dict.fromkeys(given["executors"]))
    return Options(**given)


_COUNTS = {
    "rounds": "rounds of tokens and calls, each of which visits every executor",
    "starts": "engines started in a fresh process, besides the first",
    "deaths": "workers killed",
    "stops": "executors stopped, besides the engines",
    "tokens": "tokens of each request",
    "in_flight": "simultaneous requests, besides the single ones",
    "calls": "empty collective_rpc of each round",
}


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value
