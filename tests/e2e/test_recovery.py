"""VLLM_RAY_ASCEND_RECOVER=1: an engine whose worker died serves on with new workers."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.placed import check_text, server_of, topology_of
from tests.e2e.test_death import SIZES, check_all_gone, endless, kill
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

pytestmark = pytest.mark.e2e


def pids(cluster: Cluster) -> dict[int, int]:
    (engine,) = topology_of(cluster)["engines"]
    return {rank["rank"]: rank["pid"] for rank in engine["ranks"]}


def node_of(cluster: Cluster, rank: int) -> int:
    (engine,) = topology_of(cluster)["engines"]
    address = next(each["address"] for each in engine["ranks"] if each["rank"] == rank)
    return next(node.index for node in cluster.nodes if node.address == address)


def check_serves_on(server: Server, cluster: Cluster, before: dict[int, int]) -> dict[int, int]:
    check_text(server, DENSE, 1)
    now = pids(cluster)
    assert not set(now.values()) & set(before.values())
    return now


def test_an_engine_goes_on_after_its_workers_died(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """In the middle of a request, which fails, and while it has nothing to do, when nobody notices."""
    with server_of(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, VLLM_RAY_ASCEND_RECOVER="1") as server:
        server.wait_until_healthy()
        first = pids(two_nodes_of_two)
        stream = endless(server)
        kill(two_nodes_of_two, node_of(two_nodes_of_two, 3), first[3])
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        second = check_serves_on(server, two_nodes_of_two, first)
        kill(two_nodes_of_two, node_of(two_nodes_of_two, 0), second[0])
        check_serves_on(server, two_nodes_of_two, second)
    log = (tmp_path / "log").read_text()
    assert "restart 2 of this engine" in log and "1 requests had begun and failed, 0 wait" in log
    check_all_gone(two_nodes_of_two)
