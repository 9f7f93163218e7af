"""VLLM_RAY_ASCEND_RECOVER=1: a data parallel rank that is lost comes back, while the others serve."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE, MOE, PROMPTS, zen_after
from tests.e2e.conftest import run_on_head
from tests.e2e.servers import check_text, create_server, read_topology, temporary_cluster
from tests.e2e.test_death import LIMIT_S, check_no_leftovers, send_signal, wait_until
from vllm_ray_ascend.observability.metrics import DP_RANK_RESTARTS, DP_RANK_UP, WRITES

pytestmark = pytest.mark.e2e

TWO_RANKS = (
    *("--tensor-parallel-size", "1", "--data-parallel-size", "2"),
    *("--data-parallel-size-local", "1", "--data-parallel-backend", "ray"),
)
TEXT = zen_after(PROMPTS[0])[:400]
RESTORED = "event ranks_restored "


@contextmanager
def serving(cluster: Cluster, model: Path, folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    variables = {"VLLM_RAY_ASCEND_RECOVER": "1", **variables}
    with create_server(cluster, model, folder / "log", *TWO_RANKS, *options, **variables) as server:
        server.wait_until_healthy()
        yield server
        assert server._process.poll() is None


def wait_for_event(server: Server, event: str, count: int = 1) -> None:
    wait_until(lambda: server.log.read_text().count(event) >= count, server)


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)


def start_request(server: Server, rank: int) -> openai.Stream[openai.types.Completion]:
    """Start a request to one rank that generates until its limit."""
    return client_of(server).completions.create(
        model=DENSE.name,
        prompt=PROMPTS[0],
        max_tokens=450,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"X-data-parallel-rank": str(rank)},
    )


def read_text(stream: openai.Stream[openai.types.Completion]) -> str:
    return "".join(chunk.choices[0].text for chunk in stream)


def check_texts(streams: list[openai.Stream[openai.types.Completion]]) -> None:
    """Check that all requests are served to their end."""
    assert {read_text(stream)[: len(TEXT)] for stream in streams} == {TEXT}


def engine_core(cluster: Cluster, rank: int) -> tuple[int, int]:
    """Return the index of the node, and the pid there, of a rank's engine core."""
    index = {node.address: node.index for node in cluster.nodes}
    (engine,) = (each for each in read_topology(cluster)["engines"] if each["dp_rank"] == rank)
    return index[engine["address"]], engine["pid"]


def check_niceness(cluster: Cluster) -> None:
    """Check that no process of an engine is nicer than others of its node, as Ray's actors are."""
    index = {node.address: node.index for node in cluster.nodes}
    for engine in read_topology(cluster)["engines"]:
        for process in (engine, *engine["ranks"]):
            command = ["ps", "-o", "ni=", "-p", str(process["pid"])]
            command = manager.node_command(cluster, index[process["address"]], command)
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            assert done.stdout.strip() == "0", process


def kill_raylet(cluster: Cluster, node: int) -> None:
    """Kill a node's raylet, with which Ray's processes there end."""
    command = manager.node_command(cluster, node, ["pkill", "-KILL", "-f", "/raylet/raylet "])
    subprocess.run(command, check=True, timeout=60)


def read_metrics(server: Server, name: str) -> dict[str, float]:
    """Return the values of a metric by data parallel rank."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    return {
        sample.labels["engine"]: sample.value for family in families for sample in family.samples if sample.name == name
    }


def health(server: Server) -> int:
    return httpx.get(f"{server.url}/health", timeout=30).status_code


def check_request_fails(server: Server, rank: int) -> None:
    """Check that a request to one rank is answered with an error."""
    with pytest.raises(openai.InternalServerError):
        client_of(server).completions.create(
            model=DENSE.name, prompt=PROMPTS[0], extra_headers={"X-data-parallel-rank": str(rank)}
        )


def test_a_rank_on_another_node_comes_back(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """Its engine core is killed with requests, which fail; those of the other rank continue.

    It is stopped before, so that no request is done by then.
    """
    one_by_one = ("--max-num-seqs", "1")
    with serving(two_nodes_of_one, DENSE, tmp_path, *one_by_one, VLLM_RAY_ASCEND_DEGRADED_HEALTH="503") as server:
        check_text(server, DENSE, 2)
        check_niceness(two_nodes_of_one)
        wait_until(lambda: read_metrics(server, WRITES.name).keys() == {"0", "1"}, server)
        assert read_metrics(server, DP_RANK_UP.name) == {"0": 1, "1": 1}
        process = engine_core(two_nodes_of_one, 1)
        kept = [start_request(server, 0) for _ in range(6)]
        send_signal(two_nodes_of_one, *process, signal.SIGSTOP)
        lost = [start_request(server, 1) for _ in range(3)]
        send_signal(two_nodes_of_one, *process)
        for stream in lost:
            with pytest.raises(openai.APIError):
                read_text(stream)
        assert health(server) == 503
        assert read_metrics(server, DP_RANK_UP.name) == {"0": 1, "1": 0}
        check_request_fails(server, 1)
        for _ in range(4):  # whatever the load balancer counts
            client_of(server).completions.create(model=DENSE.name, prompt=PROMPTS[0], max_tokens=1)
        check_texts(kept)
        wait_for_event(server, RESTORED)
        wait_until(lambda: health(server) == 200, server)
        check_text(server, DENSE, 2)
        assert read_metrics(server, DP_RANK_UP.name) == {"0": 1, "1": 1}
        assert read_metrics(server, DP_RANK_RESTARTS.name) == {"0": 0, "1": 1}
    check_no_leftovers(two_nodes_of_one)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("process", ["engine core", "worker"])
def test_either_rank_comes_back_from_idleness(
    two_nodes_of_one: Cluster, tmp_path: Path, rank: int, process: str
) -> None:
    """With three API servers, all of which learn of it; graphs are captured again."""
    options = ("--api-server-count", "3", "--no-enforce-eager")
    with serving(two_nodes_of_one, DENSE, tmp_path, *options) as server:
        (engine,) = (each for each in read_topology(two_nodes_of_one)["engines"] if each["dp_rank"] == rank)
        pid = engine["pid"] if process == "engine core" else engine["ranks"][0]["pid"]
        send_signal(two_nodes_of_one, rank + 1, pid)
        wait_for_event(server, RESTORED if process == "engine core" else "event workers_restarted ")
        assert health(server) == 200
        for _ in range(9):
            check_text(server, DENSE, 2)
    check_no_leftovers(two_nodes_of_one)


@pytest.mark.slow
@pytest.mark.multinode
def test_a_lost_node_is_replaced_by_a_spare_one(tmp_path: Path) -> None:
    with temporary_cluster("e2e-rank-node", 3, 1) as cluster, serving(cluster, DENSE, tmp_path) as server:
        node, _ = engine_core(cluster, 1)
        kill_raylet(cluster, node)
        wait_for_event(server, RESTORED)
        wait_until(lambda: read_metrics(server, DP_RANK_UP.name) == {"0": 1, "1": 1}, server)
        check_text(server, DENSE, 2)
        assert engine_core(cluster, 1)[0] == 5 - node


@pytest.mark.slow
@pytest.mark.multinode
def test_a_draining_node_is_left_in_order(tmp_path: Path) -> None:
    """What runs on it is finished, and its rank is started on the spare node."""
    with temporary_cluster("e2e-rank-drain", 3, 1) as cluster, serving(cluster, DENSE, tmp_path) as server:
        node, _ = engine_core(cluster, 1)
        streams = [start_request(server, 1) for _ in range(12)]
        drain(cluster, node, 300)
        check_texts(streams)
        wait_for_event(server, RESTORED)
        wait_until(lambda: read_metrics(server, DP_RANK_UP.name) == {"0": 1, "1": 1}, server)
        check_text(server, DENSE, 2)
        assert engine_core(cluster, 1)[0] == 5 - node
        assert "VRA-157" not in server.log.read_text()


def drain(cluster: Cluster, node: int, seconds: int) -> None:
    """Announce to Ray that a node is about to be stopped."""
    address = cluster.nodes[node - 1].address
    script = f"""
import ray, subprocess
ray.init(logging_level="ERROR")
(node,) = (each["NodeID"] for each in ray.nodes() if each["NodeManagerAddress"] == {address!r})
subprocess.run(["ray", "drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
    "--reason-message", "test", "--deadline-remaining-seconds", "{seconds}"], check=True)
"""
    done = run_on_head(cluster, "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_of_four_ranks_that_flaps_ten_times_does_not_end_the_others(
    two_nodes_of_two: Cluster, tmp_path: Path
) -> None:
    """It is started after growing delays, and each of the others serves meanwhile."""
    options = ("--data-parallel-size", "4", "--data-parallel-size-local", "2")
    with serving(two_nodes_of_two, DENSE, tmp_path, *options) as server:
        check_text(server, DENSE, 4)
        for count in range(1, 11):
            send_signal(two_nodes_of_two, *engine_core(two_nodes_of_two, 3))
            wait_for_event(server, "event ranks_lost ", count)
            for rank in range(3):
                answer = client_of(server).completions.create(
                    model=DENSE.name, prompt=PROMPTS[0], max_tokens=1, extra_headers={"X-data-parallel-rank": str(rank)}
                )
                assert answer.choices[0].text
            wait_for_event(server, RESTORED, count)
            wait_until(lambda: read_metrics(server, DP_RANK_UP.name)["3"] == 1, server)
        assert read_metrics(server, DP_RANK_RESTARTS.name) == {"0": 0, "1": 0, "2": 0, "3": 10}
        check_text(server, DENSE, 4)
    check_no_leftovers(two_nodes_of_two)


@pytest.mark.slow
def test_all_ranks_of_a_mixture_of_experts_are_restarted(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """They step together, and none continues without the others."""
    with serving(two_nodes_of_one, MOE, tmp_path, "--enable-expert-parallel") as server:
        check_text(server, MOE, 2)
        for count in (1, 2):
            send_signal(two_nodes_of_one, *engine_core(two_nodes_of_one, 1))
            wait_for_event(server, RESTORED, count)
            wait_until(lambda: health(server) == 200, server)
            check_text(server, MOE, 2)
        assert read_metrics(server, DP_RANK_RESTARTS.name) == {"0": 2, "1": 2}
    check_no_leftovers(two_nodes_of_one)


@pytest.mark.slow
def test_ranks_that_lack_new_weights_are_not_restarted(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """After a call that may have changed the workers, all end, as without VLLM_RAY_ASCEND_RECOVER=1."""
    with create_server(
        two_nodes_of_one, DENSE, tmp_path / "log", *TWO_RANKS, VLLM_RAY_ASCEND_RECOVER="1", VLLM_SERVER_DEV_MODE="1"
    ) as server:
        server.wait_until_healthy()
        body = {"method": "reload_weights"}
        assert httpx.post(f"{server.url}/collective_rpc", json=body, timeout=LIMIT_S).status_code == 200
        send_signal(two_nodes_of_one, *engine_core(two_nodes_of_one, 1))
        server._process.wait(LIMIT_S)
        assert "VRA-153" in server.log.read_text()
    check_no_leftovers(two_nodes_of_one)
