"""Two engines on one cluster, of which one dies: the other does not notice, and the NPUs are free for the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.placed import check_text, cluster_of, opened, server_of, topology_of
from tests.e2e.test_death import check_all_gone, endless, ends, kill
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

CLUSTER = os.environ.get("FAULTS_CLUSTER", "faults")


def serving(cluster: Cluster, log: Path) -> Server:
    return server_of(cluster, DENSE, log, "--tensor-parallel-size", "2")


def engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {engine["engine"]: engine for engine in topology_of(cluster)["engines"]}


def npus(engine: dict[str, Any]) -> set[tuple[str, int]]:
    return {(rank["address"], rank["physical"]) for rank in engine["ranks"]}


def node_of(cluster: Cluster, address: str) -> int:
    return next(node.index for node in cluster.nodes if node.address == address)


def test_one_of_two_engines_dies(tmp_path: Path) -> None:
    """A request of the other one runs meanwhile."""
    with cluster_of(CLUSTER, 2, 2) as cluster:
        with serving(cluster, tmp_path / "dying") as dying:
            dying.wait_until_healthy()
            (first,) = engines(cluster).values()
            with serving(cluster, tmp_path / "living") as living:
                living.wait_until_healthy()
                (other,) = (engine for name, engine in engines(cluster).items() if name != first["engine"])
                assert not npus(first) & npus(other)
                running = endless(living)
                victim = first["ranks"][1]
                kill(cluster, node_of(cluster, victim["address"]), victim["pid"])
                ends(dying)
                assert f"Worker process {victim['pid']} of rank 1" in (tmp_path / "dying").read_text()
                assert list(running)[-1].choices[0].finish_reason == "length"
                check_alone(cluster, other)
                with serving(cluster, tmp_path / "new") as new:
                    new.wait_until_healthy()
                    (third,) = (engine for name, engine in engines(cluster).items() if name != other["engine"])
                    assert npus(third) == npus(first)
                    check_text(new, DENSE, 1)
                    check_text(living, DENSE, 1)
                check_alone(cluster, other)
        check_all_gone(cluster)


def check_alone(cluster: Cluster, engine: dict[str, Any]) -> None:
    """Nothing is there of any other engine."""
    assert set(engines(cluster)) == {engine["engine"]}
    assert set(opened(cluster)) == {(rank["address"], rank["pid"]) for rank in engine["ranks"]}
