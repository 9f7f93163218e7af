"""A worker dies, or the driver does: who waits is told, and nothing is left on any node."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from demo.options import DemoError
from demo.server import Server
from demo.train.recitation import DENSE, PROMPTS
from tests.e2e.conftest import on_head
from tests.e2e.placed import check_text, opened, server_of, topology_of
from tests.e2e.test_bad_input import check_nothing_left
from vllm_ray_ascend.softnpu.cluster import manager
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

SIZES = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
LIMIT_S = 120.0
PATIENT = {"VLLM_RAY_ASCEND_STOP_GRACE_S": "60"}  # an end in order is what is tested, not how long it takes


@contextlib.contextmanager
def serving(cluster: Cluster, folder: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    with server_of(cluster, DENSE, folder / "log", *SIZES, *arguments, **variables) as server:
        server.wait_until_healthy()
        yield server


def endless(server: Server) -> openai.Stream[openai.types.Completion]:
    """A request that generates until its limit, of which the first piece has come."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
    stream = client.completions.create(
        model=DENSE.name, prompt=PROMPTS[0], max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    return stream


def kill(cluster: Cluster, node: int, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process of a node, by the node's own number of it."""
    subprocess.run(manager.node_command(cluster, node, ["kill", f"-{number.value}", str(pid)]), check=True, timeout=60)


def shared_memory(cluster: Cluster) -> list[str]:
    """Shared memory segments of vLLM and semaphores of Ray's channels that are left on the nodes."""
    found = []
    for node in cluster.nodes:
        command = ["sh", "-c", "ls /dev/shm"]
        done = subprocess.run(
            manager.node_command(cluster, node.index, command), capture_output=True, text=True, timeout=60, check=True
        )
        found += [f"{node.hostname}: {name}" for name in done.stdout.split() if name.startswith(("psm_", "sem."))]
    return found


def check_all_gone(cluster: Cluster) -> None:
    check_nothing_left(cluster)
    assert opened(cluster) == {}
    assert shared_memory(cluster) == []
    assert topology_of(cluster)["engines"] == []


def ends(server: Server) -> None:
    """Wait until the server has ended by itself."""
    server._process.wait(LIMIT_S)
    with pytest.raises(DemoError):
        server.check()


def killed_in_a_request(cluster: Cluster, server: Server) -> dict[str, Any]:
    """Kill a rank on the second node in the middle of a request, which fails, and the server with it; the rank."""
    engine = topology_of(cluster)["engines"][0]
    second = cluster.nodes[1].address
    victim: dict[str, Any] = next(rank for rank in engine["ranks"] if rank["address"] == second)
    stream = endless(server)
    kill(cluster, 2, victim["pid"])
    with pytest.raises((openai.APIError, httpx.HTTPError)) as raised:
        for _ in stream:
            pass
    assert not isinstance(raised.value, openai.APITimeoutError)
    ends(server)
    return victim


def test_a_worker_on_another_node_is_killed_in_the_middle_of_a_request(
    two_nodes_of_two: Cluster, tmp_path: Path
) -> None:
    """The request ends with an error and the server with it; upstream's waits 300 s."""
    with serving(two_nodes_of_two, tmp_path) as server:
        victim = killed_in_a_request(two_nodes_of_two, server)
    log = (tmp_path / "log").read_text()
    where = f"rank {victim['rank']} (node {victim['address']}, physical NPU {victim['physical']}) died."
    assert f"Worker process {victim['pid']} of {where}" in log
    check_all_gone(two_nodes_of_two)


def test_an_engine_starts_on_the_same_npus_at_once_and_ends_in_order(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    with serving(two_nodes_of_two, tmp_path, **PATIENT) as server:
        check_text(server, DENSE, 1)
        assert shared_memory(two_nodes_of_two) == []  # names are gone as soon as all ends have it open
        server._process.send_signal(signal.SIGINT)
        server._process.wait(LIMIT_S)
    log = (tmp_path / "log").read_text()
    ended, _, _ = log.partition("engine manager stopped")  # its client may say EngineDeadError then
    assert "Worker process" not in log and "did not end in time" not in log and "EngineDeadError" not in ended
    check_all_gone(two_nodes_of_two)


def test_the_driver_is_killed(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """SIGKILL of the engine core, which can tell nobody: its workers do not outlive it."""
    with serving(two_nodes_of_two, tmp_path) as server:
        engine = topology_of(two_nodes_of_two)["engines"][0]
        kill(two_nodes_of_two, 1, engine["pid"])
        ends(server)
    check_all_gone(two_nodes_of_two)


FAILING_RANK = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM
try:
    LLM(model=sys.argv[1], dtype="float32", tensor_parallel_size=2, pipeline_parallel_size=2, enforce_eager=True,
        distributed_executor_backend="ray", max_model_len=256, kv_cache_memory_bytes=16 << 20,
        worker_extension_cls="tests.e2e.dying.Dying")
except Exception as error:
    print("FAILED", type(error).__name__, error)
"""


def test_a_worker_dies_while_it_starts(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """The first death is reported, not what its siblings say about it."""
    done = on_head(two_nodes_of_two, "-c", FAILING_RANK, str(DENSE), E2E_DYING=str(tmp_path / "dying"))
    assert "FAILED WorkerDiedError Worker process" in done.stdout, (done.stdout + done.stderr)[-4000:]
    check_all_gone(two_nodes_of_two)
