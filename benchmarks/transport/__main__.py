"""`make bench-transport`: a tensor from NPU to NPU, by every way, in one run. See benchmarks/README.md."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from softnpu.cluster import manager
from softnpu.cluster.plan import Shape

from benchmarks.cluster import LOGS, ROOT
from benchmarks.measure import rotate_executors
from benchmarks.options import BenchError
from benchmarks.protocol import Child
from benchmarks.record import Benchmark, Report, Run, record
from benchmarks.statistics import Sample
from benchmarks.transport.options import BASE, CASES, Case, Options, count_of, label, read_options
from benchmarks.transport.report import markdown, plot
from demo.server import QUIET

_LIMIT_S = 300.0


def main(arguments: Sequence[str]) -> int:
    """Measure, write NAME.json, NAME.md and NAME.png, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)

    def measure(run: Run, report: Report) -> Iterator[Sample]:
        left_out: dict[str, str] = run.setdefault("left_out", {})
        for name in options.cases:
            yield from _measure(CASES[name], options, left_out, report)

    return record(Benchmark("make bench-transport", measure, BASE, markdown, plot), options)


def _measure(case: Case, options: Options, left_out: dict[str, str], report: Report) -> Iterator[Sample]:
    """Measure every way in turn, for every size in every round: compared figures are seconds apart."""
    with _driver(case, options) as driver:
        ways = list(options.ways)

        def ask(what: str, way: str, **arguments: Any) -> Any:
            """Return the seconds of each hop, or None where it fails: the run then continues without that way."""
            try:
                if way == "ray-ascend" and not options.ray_ascend:
                    raise BenchError("no --ray-ascend FOLDER")
                return driver.ask(what, _LIMIT_S, way=way, **arguments)
            except BenchError as error:
                if way == BASE:
                    raise
                ways.remove(way)
                left_out[f"{case.name}, {way}{_with(arguments)}"] = str(error)
                report(f"{case.name}: {way} is left out{_with(arguments)}: {error}")

        for way in options.ways:
            if ask("open", way) is not None:
                ask("hops", way, size=options.sizes[0], count=1)
        for number in range(options.rounds):
            for size in options.sizes:
                for way in rotate_executors(tuple(ways), number):
                    if seconds := ask("hops", way, size=size, count=count_of(size)):
                        yield Sample(case.name, way, label(size), number, seconds)
            report(f"{case.name} round {number + 1} of {options.rounds}")


def _with(arguments: dict[str, Any]) -> str:
    return f" from {label(arguments['size'])} on" if arguments else ""


@contextlib.contextmanager
def _driver(case: Case, options: Options) -> Iterator[Child]:
    """Yield a driver on a cluster of its own, which is removed afterwards."""
    name = f"bench-hops-{os.getpid() % 100000}"
    shape = Shape(
        nodes=2 if case.tcp else 1,
        npus_per_node=2 * len(options.ways),
        cpus_per_node=2,
        kind=manager.choose_node_kind()[0],
    )
    cluster, _ = manager.up(name, shape, report=lambda _: None)
    try:
        driver = Child(
            manager.node_command(cluster, 1, [sys.executable, "-m", "benchmarks.transport.child"]),
            manager.command_environment(cluster, 1, {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}),
            LOGS / f"transport-{case.name}.log",
            {"case": case.name, "root": str(ROOT), "ray_ascend": options.ray_ascend},
        )
        with contextlib.closing(driver):
            driver.ask("connect", _LIMIT_S)
            yield driver
    finally:
        manager.down(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
