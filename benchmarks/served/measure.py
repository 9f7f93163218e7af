"""The run: servers of a case side by side, each in a cluster of its own, in turns in a random order."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator

from softnpu.cluster.plan import Cluster

from benchmarks.measure import PAUSE_S
from benchmarks.served.clients import Load, measure_load
from benchmarks.served.options import CASES, Options, metric
from benchmarks.served.servers import serve
from benchmarks.statistics import Sample

Servers = dict[str, tuple[Cluster, str]]


def measure(options: Options, report: Callable[[str], None]) -> Iterator[Sample]:
    """Yield all samples of a run: seconds of each request. The first round warms the servers up and is not counted."""
    for name in options.cases:
        with contextlib.ExitStack() as stack:
            servers: Servers = {}
            for number, executor in enumerate(options.executors):
                servers[executor] = stack.enter_context(serve(CASES[name], executor, number))
                report(f"{name}: {executor} is up")
            for number in range(options.rounds + 1):
                samples = list(_measure_round(name, servers, options, number))
                report(f"{name}: round {number} of {options.rounds}")
                yield from samples if number else ()


def _measure_round(case: str, servers: Servers, options: Options, number: int) -> Iterator[Sample]:
    draw = random.Random(number)
    for client in options.clients:
        for rate in options.rates:
            for executor in draw.sample(options.executors, len(options.executors)):
                time.sleep(PAUSE_S)
                found = measure_load(client, options, *servers[executor], Load(rate, number))
                for name, seconds in found.items():
                    yield Sample(case, executor, metric(name, client, rate), number, seconds)
