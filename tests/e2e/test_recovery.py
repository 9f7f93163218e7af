"""VLLM_RAY_ASCEND_RECOVER=1: an engine whose worker died continues to serve with new workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.servers import check_text, create_server, read_topology
from tests.e2e.test_death import LIMIT_S, ONE_EACH, check_no_leftovers, send_signal, start_endless_request
from vllm_ray_ascend.executor.failure_record import FOLDER, FailureRecord
from vllm_ray_ascend.observability.metrics import (
    ABORTED,
    FAILURE_DETECTION,
    FAILURES,
    RANKS_ALIVE,
    RESTART_TIME,
    RESTARTS,
)

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


def check_metrics(server: Server) -> None:
    """Check what /metrics says after two deaths: within seconds, since a report is made every few seconds."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        if values.get(RESTARTS.name) == 2 and values[RANKS_ALIVE.name] == 2:
            break
        assert time.monotonic() < deadline, text
        time.sleep(0.5)
    assert values[FAILURES.name] == 2 and values[ABORTED.name] == 1
    assert 0 <= values[FAILURE_DETECTION.name] < LIMIT_S and 0 < values[RESTART_TIME.name] < LIMIT_S


def check_records(cluster: Cluster) -> None:
    """Check the records of the two failures: the survivors said what they were doing."""
    files = sorted(cluster.temp_dir(cluster.nodes[0]).glob(f"session_*/logs/{FOLDER}/failure-*.json"))
    records = [msgspec.json.decode(path.read_bytes(), type=FailureRecord) for path in files][-2:]
    assert [record.code for record in records] == ["VRA-322", "VRA-322"]
    for record, dead in zip(records, (1, 0), strict=True):
        assert record.engine == f"{DENSE.name}/dp0" and f"rank {dead} " in record.cause
        assert [rank.rank for rank in record.ranks] == [0, 1]
        assert all(rank.report for rank in record.ranks if rank.rank != dead)


@pytest.mark.slow
def test_an_engine_continues_after_its_workers_died(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """During a request, which fails, and while the engine is idle; with graphs, which new workers capture again."""
    arguments = (*ONE_EACH, "--no-enforce-eager")
    with create_server(two_nodes_of_one, DENSE, tmp_path / "log", *arguments, VLLM_RAY_ASCEND_RECOVER="1") as server:
        server.wait_until_healthy()
        first = worker_processes(two_nodes_of_one)
        stream = start_endless_request(server)
        send_signal(two_nodes_of_one, *first[1])
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        second = check_recovered(server, two_nodes_of_one, first)
        send_signal(two_nodes_of_one, *second[0])
        wait_for_log_text(tmp_path / "log", "restart 2 of this engine")  # a request before that would be aborted
        check_recovered(server, two_nodes_of_one, second)
        check_metrics(server)
        check_records(two_nodes_of_one)
    log = (tmp_path / "log").read_text()
    assert "aborted 1 running requests; 0 are waiting" in log
    for event in ("engine_ready", "engine_failed", "requests_aborted", "workers_restarting", "workers_restarted"):
        assert f"event {event} engine={DENSE.name}/dp0 " in log, event
    check_no_leftovers(two_nodes_of_one)
