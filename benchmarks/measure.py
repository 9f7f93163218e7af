"""The run itself: the order of executors and measurements, so that noise of the machine affects all alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from benchmarks.cluster import BenchCluster, start_cluster
from benchmarks.options import CASES, BenchError, Case, Options
from benchmarks.protocol import Child
from benchmarks.statistics import Sample, percentile

START_LIMIT_S = 300.0
LIMIT_S = 120.0
PAUSE_S = 1.2
"""Between turns: vLLM's message queues spin for a second after the last message, which slows the next engine down."""
_WARM_UP_TOKENS = 8
T = TypeVar("T")


def measure(options: Options, report: Callable[[str], None]) -> Iterator[Sample]:
    """Yield all samples of a run."""
    for name in options.cases:
        case = CASES[name]
        with start_cluster(case, options) as cluster:
            runner = _Runner(case, options, cluster, report)
            yield from runner.measure_serving()
            yield from runner.measure_starts()
            if not case.tcp:  # the workers' processes are on another node, where the engine cannot kill or watch them
                yield from runner.measure_lifetimes()


def rotate_executors(executors: Sequence[T], number: int) -> Sequence[T]:
    """Return ``executors`` in the order of round ``number``, which rotates: A B C, B C A, C A B, ..."""
    first = number % len(executors)
    return (*executors[first:], *executors[:first])


class _Runner:
    def __init__(self, case: Case, options: Options, cluster: BenchCluster, report: Callable[[str], None]) -> None:
        self._case = case
        self._options = options
        self._cluster = cluster
        self._report = report

    def measure_serving(self) -> Iterator[Sample]:
        """Measure tokens and calls, with one engine of each executor running all the time."""
        options = self._options
        if not options.rounds:
            return
        with contextlib.ExitStack() as stack:
            children = {}
            for executor in options.executors:
                child = stack.enter_context(contextlib.closing(self._cluster.child(executor, "serving")))
                yield from self._start(child, executor, 0)
                children[executor] = child
            for child in children.values():
                for requests in (1, options.in_flight):
                    child.ask("generate", LIMIT_S, requests=requests, tokens=_WARM_UP_TOKENS)
            yield from self._measure_rounds(children)
            for executor, child in children.items():
                yield from self._stop(child, executor, 0)

    def _measure_rounds(self, children: dict[str, Child]) -> Iterator[Sample]:
        """Measure one thing after another in each round, each with all executors in turn, seconds apart."""
        options = self._options
        tokens_of: dict[int, Any] = {}
        for number in range(options.rounds):
            for requests in dict.fromkeys((1, options.in_flight)):
                for executor in rotate_executors(options.executors, number):
                    result = self._ask(children[executor], "generate", requests=requests, tokens=options.tokens)
                    if tokens_of.setdefault(requests, result["tokens"]) != result["tokens"]:
                        raise BenchError(
                            f"{self._case.name}: {executor} chose other tokens than another executor did, so their "
                            f"times cannot be compared: see {children[executor].log}."
                        )
                    yield self._sample(executor, f"token, {requests} in flight", number, result["token"])
                    yield self._sample(executor, f"first token, {requests} in flight", number, result["first"])
            for executor in rotate_executors(options.executors, number):
                seconds = self._ask(children[executor], "call", count=options.calls)
                yield self._sample(executor, "empty call", number, seconds)
                yield self._sample(executor, "empty call, p99", number, [percentile(seconds, 0.99)])
            self._report(f"{self._case.name} round {number + 1} of {options.rounds}")

    def _ask(self, child: Child, what: str, **arguments: Any) -> Any:
        time.sleep(PAUSE_S)
        return child.ask(what, LIMIT_S, **arguments)

    def measure_starts(self) -> Iterator[Sample]:
        """Measure starts of engines, each alone and in a process of its own."""
        for number in range(1, self._options.starts + 1):
            for executor in rotate_executors(self._options.executors, number):
                with contextlib.closing(self._cluster.child(executor, "start")) as child:
                    yield from self._start(child, executor, number)
                    yield from self._stop(child, executor, number)

    def measure_lifetimes(self) -> Iterator[Sample]:
        """Measure killed workers and stops of executors without engines, which are made repeatedly in one process."""
        options = self._options
        victims = [number % self._case.world_size for number in range(options.deaths)]
        ends: list[int | None] = [*victims, *[None] * options.stops]
        if not ends:
            return
        with contextlib.ExitStack() as stack:
            children = {
                executor: stack.enter_context(contextlib.closing(self._cluster.child(executor, "lives")))
                for executor in options.executors
            }
            for child in children.values():
                child.ask("prepare", START_LIMIT_S)
            for number, victim in enumerate(ends):
                for executor in rotate_executors(options.executors, number):
                    life = children[executor].ask("life", START_LIMIT_S, victim=victim)
                    yield self._sample(executor, "executor start", number, [sum(life["phases"].values())])
                    metric = "executor stop" if victim is None else "death"
                    yield from self._end_samples(life["end"], metric, executor, number)
                self._report(f"{self._case.name} life {number + 1} of {len(ends)}")

    def _start(self, child: Child, executor: str, number: int) -> Iterator[Sample]:
        phases: dict[str, float] = child.ask("start", START_LIMIT_S)
        whole = sum(phases.values())
        yield self._sample(executor, "start", number, [whole])
        yield self._sample(executor, "start without load", number, [whole - phases["load"]])
        for phase, seconds in phases.items():
            yield self._sample(executor, f"start: {phase}", number, [seconds])
        self._report(f"{self._case.name} start {number + 1}: {executor} {whole:.1f} s")

    def _stop(self, child: Child, executor: str, number: int) -> Iterator[Sample]:
        time.sleep(PAUSE_S)
        yield from self._end_samples(
            child.ask("stop", LIMIT_S, watch=not self._case.tcp), "engine stop", executor, number
        )

    def _end_samples(self, ends: dict[str, float | None], metric: str, executor: str, number: int) -> Iterator[Sample]:
        for name, seconds in ends.items():
            if seconds is None:
                self._report(f"{self._case.name} {metric}, {name}: never, by {executor}")
            else:
                yield self._sample(executor, f"{metric} to {name}", number, [seconds])

    def _sample(self, executor: str, metric: str, number: int, values: list[float]) -> Sample:
        return Sample(self._case.name, executor, metric, number, values)
