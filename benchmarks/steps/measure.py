"""The run: executors of a case side by side, each in a cluster of its own, in turns in a random order."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape

from benchmarks.cluster import LOGS, engine_variables
from benchmarks.measure import LIMIT_S, PAUSE_S, START_LIMIT_S
from benchmarks.protocol import Child
from benchmarks.statistics import Sample
from benchmarks.steps.options import CASES, Case, Options

_WARM_UP_STEPS = 50
_DELAY_S = {"ours+50us": 50e-6}


def measure(options: Options, report: Callable[[str], None]) -> Iterator[Sample]:
    """Yield all samples of a run: seconds a step, or a count a step."""
    for name in options.cases:
        with contextlib.ExitStack() as stack:
            children = {}
            for number, executor in enumerate(options.executors):
                children[executor] = stack.enter_context(_executor(CASES[name], executor, number))
                report(f"{name}: {executor} is up")
            yield from _measure_rounds(name, children, options, report)


def _measure_rounds(
    case: str, children: dict[str, Child], options: Options, report: Callable[[str], None]
) -> Iterator[Sample]:
    for child in children.values():
        child.ask("steps", LIMIT_S, count=_WARM_UP_STEPS, requests=options.requests)
    shuffle = random.Random(0)
    for number in range(options.rounds):
        for executor in shuffle.sample(options.executors, len(options.executors)):
            time.sleep(PAUSE_S)
            used = children[executor].ask("steps", LIMIT_S, count=options.steps, requests=options.requests)
            for metric, value in used.items():
                yield Sample(case, executor, metric, number, [value])
        report(f"{case}: round {number + 1} of {options.rounds}")


@contextlib.contextmanager
def _executor(case: Case, executor: str, number: int) -> Iterator[Child]:
    """Yield the process of an executor on the first node of a new cluster; mp has one on each other node too."""
    name = f"steps-{os.getpid() % 100000}-{number}"
    shape = Shape(
        nodes=case.nodes, npus_per_node=case.npus_per_node, cpus_per_node=2, kind=manager.choose_node_kind()[0]
    )
    cluster, _ = manager.up(name, shape, settings={}, report=lambda _: None)
    try:
        with contextlib.ExitStack() as stack:
            count = case.nodes if executor == "mp" else 1
            children = [_child(cluster, case, executor, node_rank) for node_rank in range(count)]
            for child in children:
                stack.callback(child.close)
            for child in children:
                child.send("start")
            for child in children:
                child.answer(START_LIMIT_S)
            yield children[0]
            children[0].ask("stop", LIMIT_S)
    finally:
        manager.down(name)


def _child(cluster: Cluster, case: Case, executor: str, node_rank: int) -> Child:
    over_ray = executor != "mp"
    variables = engine_variables(executor.partition("+")[0])
    if not over_ray:
        variables["VLLM_HOST_IP"] = cluster.nodes[node_rank].address
    settings: dict[str, Any] = {
        "backend": "ray" if over_ray else "mp",
        "tp": case.tp,
        "pp": case.pp,
        "nodes": case.nodes,
        "node_rank": node_rank,
        "master": cluster.nodes[0].address,
        "delay_s": _DELAY_S.get(executor, 0.0),
    }
    return Child(
        manager.node_command(cluster, node_rank + 1, [sys.executable, "-m", "benchmarks.steps.child"]),
        manager.command_environment(cluster, node_rank + 1, variables),
        LOGS / f"steps-{case.name}-{executor}-{node_rank}.log",
        settings,
    )
