"""The run itself: which executor does what in which order, so that noise of the machine hits all alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from benchmarks.options import CASES, BenchError, Case, Options
from benchmarks.place import Place, place_for
from benchmarks.protocol import Child
from benchmarks.statistics import Sample

_START_LIMIT_S = 300.0
_LIMIT_S = 120.0
_PAUSE_S = 1.2
"""Between turns: vLLM's message queues spin for a second after the last message, which slows the next engine down."""
_WARM_UP_TOKENS = 8
T = TypeVar("T")


def measure(options: Options, report: Callable[[str], None]) -> Iterator[Sample]:
    """All samples of a run."""
    for name in options.cases:
        case = CASES[name]
        with place_for(case, options) as place:
            runner = _Runner(case, options, place, report)
            yield from runner.serving()
            yield from runner.starts()
            if not case.tcp:  # the workers' processes are on another node, where the engine cannot kill or watch them
                yield from runner.lives()


def turn(executors: Sequence[T], number: int) -> Sequence[T]:
    """``executors`` in the order of round ``number``, each round beginning with another: A B C, B C A, C A B, ..."""
    first = number % len(executors)
    return (*executors[first:], *executors[:first])


class _Runner:
    def __init__(self, case: Case, options: Options, place: Place, report: Callable[[str], None]) -> None:
        self._case = case
        self._options = options
        self._place = place
        self._report = report

    def serving(self) -> Iterator[Sample]:
        """Tokens and calls, with one engine of each executor alive all the while."""
        options = self._options
        if not options.rounds:
            return
        with contextlib.ExitStack() as stack:
            children = {}
            for executor in options.executors:
                child = stack.enter_context(contextlib.closing(self._place.child(executor, "serving")))
                yield from self._start(child, executor, 0)
                children[executor] = child
            for child in children.values():
                for requests in (1, options.in_flight):
                    child.ask("generate", _LIMIT_S, requests=requests, tokens=_WARM_UP_TOKENS)
            yield from self._rounds(children)
            for executor, child in children.items():
                yield from self._stop(child, executor, 0)

    def _rounds(self, children: dict[str, Child]) -> Iterator[Sample]:
        """One thing after another in each round, each by all executors in turn: their figures are seconds apart."""
        options = self._options
        said: dict[int, Any] = {}
        for number in range(options.rounds):
            for requests in dict.fromkeys((1, options.in_flight)):
                for executor in turn(options.executors, number):
                    result = self._ask(children[executor], "generate", requests=requests, tokens=options.tokens)
                    if said.setdefault(requests, result["tokens"]) != result["tokens"]:
                        raise BenchError(
                            f"{self._case.name}: {executor} chose other tokens than another executor did, so their "
                            f"times cannot be compared: see {children[executor].log}."
                        )
                    yield self._sample(executor, f"token, {requests} in flight", number, result["token"])
                    yield self._sample(executor, f"first token, {requests} in flight", number, result["first"])
            for executor in turn(options.executors, number):
                seconds = self._ask(children[executor], "call", count=options.calls)
                yield self._sample(executor, "empty call", number, seconds)
            self._report(f"{self._case.name} round {number + 1} of {options.rounds}")

    def _ask(self, child: Child, what: str, **arguments: Any) -> Any:
        time.sleep(_PAUSE_S)
        return child.ask(what, _LIMIT_S, **arguments)

    def starts(self) -> Iterator[Sample]:
        """Engines started, each in a process of its own and alone."""
        for number in range(1, self._options.starts + 1):
            for executor in turn(self._options.executors, number):
                with contextlib.closing(self._place.child(executor, "start")) as child:
                    yield from self._start(child, executor, number)
                    yield from self._stop(child, executor, number)

    def lives(self) -> Iterator[Sample]:
        """Executors without engines, made and ended again and again in one process: killed workers, and stops."""
        options = self._options
        victims = [number % self._case.world_size for number in range(options.deaths)]
        ends: list[int | None] = [*victims, *[None] * options.stops]
        if not ends:
            return
        with contextlib.ExitStack() as stack:
            children = {
                executor: stack.enter_context(contextlib.closing(self._place.child(executor, "lives")))
                for executor in options.executors
            }
            for child in children.values():
                child.ask("prepare", _START_LIMIT_S)
            for number, victim in enumerate(ends):
                for executor in turn(options.executors, number):
                    life = children[executor].ask("life", _START_LIMIT_S, victim=victim)
                    yield self._sample(executor, "executor start", number, [sum(life["phases"].values())])
                    metric = "executor stop" if victim is None else "death"
                    yield from self._ended(life["end"], metric, executor, number)
                self._report(f"{self._case.name} life {number + 1} of {len(ends)}")

    def _start(self, child: Child, executor: str, number: int) -> Iterator[Sample]:
        phases: dict[str, float] = child.ask("start", _START_LIMIT_S)
        whole = sum(phases.values())
        yield self._sample(executor, "start", number, [whole])
        yield self._sample(executor, "start without load", number, [whole - phases["load"]])
        for phase, seconds in phases.items():
            yield self._sample(executor, f"start: {phase}", number, [seconds])
        self._report(f"{self._case.name} start {number + 1}: {executor} {whole:.1f} s")

    def _stop(self, child: Child, executor: str, number: int) -> Iterator[Sample]:
        time.sleep(_PAUSE_S)
        yield from self._ended(child.ask("stop", _LIMIT_S, watch=not self._case.tcp), "engine stop", executor, number)

    def _ended(self, ends: dict[str, float | None], metric: str, executor: str, number: int) -> Iterator[Sample]:
        for name, seconds in ends.items():
            if seconds is None:
                self._report(f"{self._case.name} {metric}, {name}: never, by {executor}")
            else:
                yield self._sample(executor, f"{metric} to {name}", number, [seconds])

    def _sample(self, executor: str, metric: str, number: int, values: list[float]) -> Sample:
        return Sample(self._case.name, executor, metric, number, values)
