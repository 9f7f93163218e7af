"""Nodes of software NPUs for the engines of one case, all alive at the same time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape

from benchmarks.options import Case, Options
from benchmarks.protocol import Child
from demo.server import QUIET
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".demo" / "bench"
_GRAPH_OF_VLLM = {
    "VLLM_RAY_ASCEND_EXECUTOR": "upstream",
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0",
    "VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE": "shm",
}


class BenchCluster:
    """A cluster whose first node has NPUs for mp that Ray does not know of, and whose last has those that Ray gives."""

    def __init__(self, cluster: Cluster, case: Case, options: Options) -> None:
        self._cluster = cluster
        self._case = case
        self._options = options

    def child(self, executor: str, purpose: str) -> Child:
        """Return a process on the first node for an engine of ``executor``."""
        variables = engine_variables(executor)
        if not _over_ray(executor):
            own = self._cluster.shape.npus_per_node - self._case.world_size
            variables[VISIBLE_DEVICES] = ",".join(str(own + rank) for rank in range(self._case.world_size))
        settings = {
            "backend": "ray" if _over_ray(executor) else "mp",
            "tp": self._case.tp,
            "pp": self._case.pp,
            "graphs": self._options.graphs,
        }
        return Child(
            manager.node_command(self._cluster, 1, [sys.executable, "-m", "benchmarks.child"]),
            manager.command_environment(self._cluster, 1, variables),
            LOGS / f"{self._case.name}-{executor}-{purpose}.log",
            settings,
        )


def engine_variables(executor: str) -> dict[str, str]:
    """Return the environment of a process with an engine of ``executor``."""
    variables = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not _over_ray(executor):
        return variables | {"VLLM_WORKER_MULTIPROC_METHOD": "fork" if executor == "mp-fork" else "spawn"}
    return variables | (_GRAPH_OF_VLLM if executor == "upstream-graph" else {"VLLM_RAY_ASCEND_EXECUTOR": executor})


def _over_ray(executor: str) -> bool:
    return not executor.startswith("mp")


@contextlib.contextmanager
def start_cluster(case: Case, options: Options) -> Iterator[BenchCluster]:
    """Yield a cluster for ``case``; removed afterwards."""
    name = f"bench-{os.getpid() % 100000}"
    over_ray = case.world_size * sum(map(_over_ray, options.executors))
    npus = over_ray + case.world_size
    shape = Shape(nodes=2 if case.tcp else 1, npus_per_node=npus, cpus_per_node=2, kind=manager.choose_node_kind()[0])
    seen = ",".join(map(str, range(max(1, over_ray))))
    settings = {1: {VISIBLE_DEVICES: "0"}, 2: {VISIBLE_DEVICES: seen}} if case.tcp else {1: {VISIBLE_DEVICES: seen}}
    cluster, _ = manager.up(name, shape, settings=settings, report=lambda _: None)
    try:
        with contextlib.ExitStack() as stack:
            if case.tcp:
                stack.enter_context(_held(cluster))
            yield BenchCluster(cluster, case, options)
    finally:
        manager.down(name)


@contextlib.contextmanager
def _held(cluster: Cluster) -> Iterator[None]:
    """Hold the one NPU of the first node, so that all workers go to the other."""
    holder = Child(
        manager.node_command(cluster, 1, [sys.executable, "-m", "benchmarks.reserve_npus"]),
        manager.command_environment(cluster, 1, {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}),
        LOGS / "hold.log",
        {"address": cluster.nodes[0].address},
    )
    try:
        holder.ask("hold", 60.0)
        yield
    finally:
        holder.close()
