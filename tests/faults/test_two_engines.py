"""Two engines on one cluster, of which one fails: the other is not affected, and the NPUs are free for the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.servers import check_text, create_server, opened_npus, read_topology, temporary_cluster
from tests.e2e.test_death import check_no_leftovers, send_signal, start_endless_request, wait_for_server_exit

CLUSTER = os.environ.get("FAULTS_CLUSTER", "faults")


def create_tp2_server(cluster: Cluster, log: Path) -> Server:
    return create_server(cluster, DENSE, log, "--tensor-parallel-size", "2")


def running_engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {engine["engine"]: engine for engine in read_topology(cluster)["engines"]}


def physical_npus(engine: dict[str, Any]) -> set[tuple[str, int]]:
    return {(rank["address"], rank["physical"]) for rank in engine["ranks"]}


def node_index(cluster: Cluster, address: str) -> int:
    return next(node.index for node in cluster.nodes if node.address == address)


def test_one_of_two_engines_fails(tmp_path: Path) -> None:
    """A request of the other one runs meanwhile."""
    with temporary_cluster(CLUSTER, 2, 2) as cluster:
        with create_tp2_server(cluster, tmp_path / "dying") as dying:
            dying.wait_until_healthy()
            (first,) = running_engines(cluster).values()
            with create_tp2_server(cluster, tmp_path / "living") as living:
                living.wait_until_healthy()
                (other,) = (engine for name, engine in running_engines(cluster).items() if name != first["engine"])
                assert not physical_npus(first) & physical_npus(other)
                running = start_endless_request(living)
                victim = first["ranks"][1]
                send_signal(cluster, node_index(cluster, victim["address"]), victim["pid"])
                wait_for_server_exit(dying)
                assert f"Worker process {victim['pid']} of rank 1" in (tmp_path / "dying").read_text()
                assert list(running)[-1].choices[0].finish_reason == "length"
                check_only_engine(cluster, other)
                with create_tp2_server(cluster, tmp_path / "new") as new:
                    new.wait_until_healthy()
                    (third,) = (engine for name, engine in running_engines(cluster).items() if name != other["engine"])
                    assert physical_npus(third) == physical_npus(first)
                    check_text(new, DENSE, 1)
                    check_text(living, DENSE, 1)
                check_only_engine(cluster, other)
        check_no_leftovers(cluster)


def check_only_engine(cluster: Cluster, engine: dict[str, Any]) -> None:
    """Check that nothing of another engine is left."""
    assert set(running_engines(cluster)) == {engine["engine"]}
    assert set(opened_npus(cluster)) == {(rank["address"], rank["pid"]) for rank in engine["ranks"]}
