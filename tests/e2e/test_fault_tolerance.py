"""vLLM's own API of fault tolerance: what we detect is there, with the first cause."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import MOE
from tests.e2e.servers import create_server, read_topology
from tests.e2e.test_death import LIMIT_S, send_signal

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ONE_SERVER_EACH = (
    *("--tensor-parallel-size", "1", "--data-parallel-size", "2", "--data-parallel-size-local", "2"),
    *("--enable-expert-parallel", "--data-parallel-multi-port-external-lb"),
)
"""vLLM has this API for data parallel ranks of a MoE model with a server each, and for nothing else."""


def status_of(server: Server) -> dict[str, Any]:
    """Return the status of the first server's engine."""
    answer = httpx.get(f"{server.url}/fault_tolerance/status", timeout=30).raise_for_status().json()
    (status,) = answer["engines"]
    return dict(status)


def test_the_status_of_a_dead_engine_has_the_first_cause(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    arguments = (*ONE_SERVER_EACH, "--enable-fault-tolerance")
    with create_server(two_nodes_of_two, MOE, tmp_path / "log", *arguments) as server:
        server.wait_until_healthy()
        assert status_of(server)["status"] == "healthy"
        (engine,) = (each for each in read_topology(two_nodes_of_two)["engines"] if each["dp_rank"] == 0)
        (rank,) = engine["ranks"]
        (node,) = (node for node in two_nodes_of_two.nodes if node.address == rank["address"])
        send_signal(two_nodes_of_two, node.index, rank["pid"])
        deadline = time.monotonic() + LIMIT_S
        while "fault_info" not in (status := status_of(server)):
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
    assert status["status"] == "dead" and status["fault_info"].startswith("VRA-322: Worker process")
