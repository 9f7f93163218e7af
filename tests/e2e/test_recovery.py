"""VLLM_RAY_ASCEND_RECOVER=1: an engine whose worker died serves on with new workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import openai
import pytest

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.placed import check_text, server_of, topology_of
from tests.e2e.test_death import LIMIT_S, SIZES, check_all_gone, endless, kill
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

pytestmark = pytest.mark.e2e


class Process(NamedTuple):
    """A worker's, by the index of its node and its number there."""

    node: int
    pid: int


def workers(cluster: Cluster) -> dict[int, Process]:
    """Those of the one engine, by rank."""
    (engine,) = topology_of(cluster)["engines"]
    index = {node.address: node.index for node in cluster.nodes}
    return {rank["rank"]: Process(index[rank["address"]], rank["pid"]) for rank in engine["ranks"]}


def wait_for_log(log: Path, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert time.monotonic() < deadline, f"{log} does not say: {text}"
        time.sleep(0.1)


def check_serves_on(server: Server, cluster: Cluster, before: dict[int, Process]) -> dict[int, Process]:
    check_text(server, DENSE, 1)
    now = workers(cluster)
    assert not {each.pid for each in now.values()} & {each.pid for each in before.values()}
    return now


def test_an_engine_goes_on_after_its_workers_died(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """In the middle of a request, which fails, and while it has nothing to do, when nobody notices."""
    with server_of(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, VLLM_RAY_ASCEND_RECOVER="1") as server:
        server.wait_until_healthy()
        first = workers(two_nodes_of_two)
        stream = endless(server)
        kill(two_nodes_of_two, *first[3])
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        second = check_serves_on(server, two_nodes_of_two, first)
        kill(two_nodes_of_two, *second[0])
        wait_for_log(tmp_path / "log", "restart 2 of this engine")  # a request before that would have begun
        check_serves_on(server, two_nodes_of_two, second)
    log = (tmp_path / "log").read_text()
    assert "1 requests had begun and failed, 0 wait" in log
    check_all_gone(two_nodes_of_two)
