"""What one run measures, and which figures it is to reach."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks.options import BASE
from benchmarks.statistics import Goal

EXECUTORS = ("mp", "upstream", "ours", "ours+50us")
"""As in benchmarks.options; and ours with 50 µs of work added to each step, which the benchmark has to find."""


@dataclasses.dataclass(frozen=True)
class Case:
    """How the workers are laid out. ``nodes``: each has its part of the pipeline's stages; mp runs with --nnodes."""

    name: str
    tp: int
    pp: int
    nodes: int = 1

    @property
    def npus_per_node(self) -> int:
        """NPUs of each node."""
        return self.tp * self.pp // self.nodes


CASES = {
    case.name: case
    for case in (Case("tp1", 1, 1), Case("tp2", 2, 1), Case("pp2", 1, 2), Case("tp2-pp2-two-nodes", 2, 2, nodes=2))
}


WALL, CPU = "step", "CPU of all processes"
GOALS = (
    Goal("tp1", CPU, 1.00),
    Goal("tp2", CPU, 1.00),
    Goal("pp2", CPU, 1.00),
    Goal("tp2-pp2-two-nodes", CPU, 0.95),
    Goal("tp1", WALL, 1.02),
    Goal("tp2", WALL, 1.02),
    Goal("pp2", WALL, 1.02),
    Goal("tp2-pp2-two-nodes", WALL, 1.02),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """``rounds``: each visits every executor; ``steps``: of an executor in a round."""

    cases: tuple[str, ...] = tuple(CASES)
    executors: tuple[str, ...] = EXECUTORS[:3]
    rounds: int = 20
    steps: int = 400
    requests: int = 8
    base: str = BASE
    name: str = "steps"


def read_options(arguments: Sequence[str]) -> Options:
    """Parse the command line."""
    default = Options()
    parser = argparse.ArgumentParser(prog="make bench-steps", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default.cases)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=default.executors)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="each visits every executor")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of an executor in a round")
    parser.add_argument("--requests", type=int, default=default.requests, help="requests of a step, one token each")
    parser.add_argument("--base", choices=EXECUTORS, default=default.base, help="what ratios are over")
    parser.add_argument("--name", default=default.name, help="of the files in benchmarks/results")
    given = vars(parser.parse_args(arguments))
    given["cases"], given["executors"] = tuple(dict.fromkeys(given["cases"])), tuple(dict.fromkeys(given["executors"]))
    return Options(**given)
