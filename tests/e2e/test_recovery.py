"""VLLM_RAY_ASCEND_RECOVER=1: an engine whose worker died continues to serve with new workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.servers import check_text, create_server, read_topology
from tests.e2e.test_death import LIMIT_S, SIZES, check_no_leftovers, send_signal, start_endless_request

pytestmark = pytest.mark.e2e


class Process(NamedTuple):
    """A worker process, by the index of its node and its pid on that node."""

    node: int
    pid: int


def worker_processes(cluster: Cluster) -> dict[int, Process]:
    """Return the workers of the only engine, by rank."""
    (engine,) = read_topology(cluster)["engines"]
    index = {node.address: node.index for node in cluster.nodes}
    return {rank["rank"]: Process(index[rank["address"]], rank["pid"]) for rank in engine["ranks"]}


def wait_for_log_text(log: Path, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert time.monotonic() < deadline, f"{log} does not contain: {text}"
        time.sleep(0.1)


def check_recovered(server: Server, cluster: Cluster, before: dict[int, Process]) -> dict[int, Process]:
    check_text(server, DENSE, 1)
    now = worker_processes(cluster)
    assert not {each.pid for each in now.values()} & {each.pid for each in before.values()}
    return now


def test_an_engine_continues_after_its_workers_died(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """During a request, which fails, and while the engine is idle; with graphs, which new workers capture again."""
    arguments = (*SIZES, "--no-enforce-eager")
    with create_server(two_nodes_of_two, DENSE, tmp_path / "log", *arguments, VLLM_RAY_ASCEND_RECOVER="1") as server:
        server.wait_until_healthy()
        first = worker_processes(two_nodes_of_two)
        stream = start_endless_request(server)
        send_signal(two_nodes_of_two, *first[3])
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        second = check_recovered(server, two_nodes_of_two, first)
        send_signal(two_nodes_of_two, *second[0])
        wait_for_log_text(tmp_path / "log", "restart 2 of this engine")  # a request before that would be aborted
        check_recovered(server, two_nodes_of_two, second)
    log = (tmp_path / "log").read_text()
    assert "aborted 1 running requests; 0 are waiting" in log
    check_no_leftovers(two_nodes_of_two)
