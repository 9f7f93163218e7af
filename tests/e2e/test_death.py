"""A worker or the driver dies: the failure is reported to whoever waits, and nothing is left on any node."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.options import DemoError
from demo.server import Server
from demo.train.recitation import DENSE, PROMPTS
from tests.e2e.conftest import find_logs_with, run_on_head
from tests.e2e.servers import check_text, create_server, opened_npus, read_topology
from tests.e2e.test_bad_input import check_nothing_left

SIZES = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
ONE_EACH = ("--tensor-parallel-size", "1", "--pipeline-parallel-size", "2")
"""Then a rank on each of two nodes."""
LIMIT_S = 120.0
START_LIMIT_S = 600.0
PATIENT = {"VLLM_RAY_ASCEND_STOP_GRACE_S": "60"}  # the test is of an orderly shutdown, not of its duration


@contextlib.contextmanager
def running_server(cluster: Cluster, folder: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    with create_server(cluster, DENSE, folder / "log", *SIZES, *arguments, **variables) as server:
        server.wait_until_healthy()
        yield server


def start_endless_request(server: Server) -> openai.Stream[openai.types.Completion]:
    """Start a request that generates until its limit, and wait for its first chunk."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
    stream = client.completions.create(
        model=DENSE.name, prompt=PROMPTS[0], max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    return stream


def wait_until(condition: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {START_LIMIT_S:g} s; the server's log: {server.log}"
        time.sleep(0.2)


def send_signal(cluster: Cluster, node: int, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process of a node, by the node's own number of it."""
    subprocess.run(manager.node_command(cluster, node, ["kill", f"-{number.value}", str(pid)]), check=True, timeout=60)


def parent_of(cluster: Cluster, node: int, pid: int) -> int:
    """Return the parent of a process of a node, by the node's own numbers."""
    command = manager.node_command(cluster, node, ["ps", "-o", "ppid=", "-p", str(pid)])
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def leftover_shared_memory(cluster: Cluster, known: str = "") -> list[str]:
    """Return shared memory segments of vLLM and semaphores that are left on the nodes.

    Those whose names begin with ``known`` do not count.
    """
    found = []
    for node in cluster.nodes:
        command = ["sh", "-c", "ls /dev/shm"]
        done = subprocess.run(
            manager.node_command(cluster, node.index, command), capture_output=True, text=True, timeout=60, check=True
        )
        names = [name for name in done.stdout.split() if name.startswith(("psm_", "sem."))]
        found += [f"{node.hostname}: {name}" for name in names if not known or not name.startswith(known)]
    return found


def check_no_leftovers(cluster: Cluster, known: str = "") -> None:
    check_nothing_left(cluster)
    assert opened_npus(cluster) == {}
    assert leftover_shared_memory(cluster, known) == []
    assert read_topology(cluster)["engines"] == []


def wait_for_server_exit(server: Server, limit_s: float = LIMIT_S) -> None:
    """Wait until the server has exited by itself, with the exit code of a failure."""
    assert server._process.wait(limit_s) == 1
    with pytest.raises(DemoError):
        server.check()


def kill_worker_in_request(cluster: Cluster, server: Server) -> dict[str, Any]:
    """Kill a rank on the second node during a request, which fails, and the server with it. Return the rank."""
    engine = read_topology(cluster)["engines"][0]
    second = cluster.nodes[1].address
    victim: dict[str, Any] = next(rank for rank in engine["ranks"] if rank["address"] == second)
    stream = start_endless_request(server)
    send_signal(cluster, 2, victim["pid"])
    with pytest.raises((openai.APIError, httpx.HTTPError)) as raised:
        for _ in stream:
            pass
    assert not isinstance(raised.value, openai.APITimeoutError)
    wait_for_server_exit(server)
    return victim


def test_a_worker_on_another_node_is_killed_during_a_request(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """The request ends with an error and the server with it; upstream's waits 300 s."""
    with running_server(two_nodes_of_two, tmp_path) as server:
        victim = kill_worker_in_request(two_nodes_of_two, server)
    log = (tmp_path / "log").read_text()
    where = f"rank {victim['rank']} (node {victim['address']}, physical NPU {victim['physical']}) died."
    assert f"Worker process {victim['pid']} of {where}" in log
    check_no_leftovers(two_nodes_of_two)


@pytest.mark.slow
def test_an_error_of_the_device_is_reported_with_its_rank_and_meaning(
    two_nodes_of_two: Cluster, tmp_path: Path
) -> None:
    """An HCCL peer falls silent. Under asynchronous scheduling the error of a request's last step surfaces in a thread.

    The request has one step: there is no next one that would wait for the NPU.
    """
    faults = tmp_path / "faults"
    faults.write_text("")
    variables = {
        "SOFTNPU_FAULTS": f"@{faults}",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "SOFTNPU_FAULTS",
        "HCCL_EXEC_TIMEOUT": "20",
    }
    with running_server(two_nodes_of_two, tmp_path, "--pipeline-parallel-size", "1", **variables) as server:
        faults.write_text("hccl_silent:rank=1")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
        with pytest.raises((openai.APIError, httpx.HTTPError)) as raised:
            client.completions.create(model=DENSE.name, prompt=PROMPTS[0], max_tokens=1)
        assert not isinstance(raised.value, openai.APITimeoutError)
        wait_for_server_exit(server)
    log = (tmp_path / "log").read_text()
    assert re.search(r"VRA-321: rank 0 \(node [\d.]+, physical NPU \d\) failed: RuntimeError: ", log)
    assert "HCCL_EXEC_TIMEOUT" in log  # the meaning of the code
    assert find_logs_with(two_nodes_of_two, "VRA-326: get_output failed")
    check_no_leftovers(two_nodes_of_two)


def test_an_engine_starts_on_the_same_npus_at_once_and_shuts_down_in_order(
    two_nodes_of_one: Cluster, tmp_path: Path
) -> None:
    with running_server(two_nodes_of_one, tmp_path, *ONE_EACH, **PATIENT) as server:
        check_text(server, DENSE, 1)
        assert leftover_shared_memory(two_nodes_of_one) == []  # names are gone as soon as all ends have it open
        server._process.send_signal(signal.SIGINT)
        assert server._process.wait(LIMIT_S) == 0
    log = (tmp_path / "log").read_text()
    ended, _, _ = log.partition("engine manager stopped")  # its client may say EngineDeadError then
    assert "Worker process" not in log and "did not exit in time" not in log and "EngineDeadError" not in ended
    check_no_leftovers(two_nodes_of_one)


@pytest.mark.slow
def test_the_driver_is_killed(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """SIGKILL of the engine core, which cannot notify anybody: its workers do not outlive it."""
    with running_server(two_nodes_of_one, tmp_path, *ONE_EACH) as server:
        engine = read_topology(two_nodes_of_one)["engines"][0]
        send_signal(two_nodes_of_one, 1, engine["pid"])
        wait_for_server_exit(server)
    check_no_leftovers(two_nodes_of_one)


@pytest.mark.slow
def test_the_server_is_killed(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """SIGKILL of the process above the engine core, as of a replica of Ray Serve: the engine ends, without a trace."""
    with tempfile.TemporaryDirectory() as sockets:
        with running_server(two_nodes_of_one, tmp_path, *ONE_EACH, VLLM_RPC_BASE_PATH=sockets) as server:
            (engine,) = read_topology(two_nodes_of_one)["engines"]
            assert os.listdir(sockets), "there is something to remove"
            send_signal(two_nodes_of_one, 1, parent_of(two_nodes_of_one, 1, engine["pid"]))
            assert server._process.wait(LIMIT_S) == 128 + signal.SIGKILL
            deadline = time.monotonic() + LIMIT_S
            while opened_npus(two_nodes_of_one) or read_topology(two_nodes_of_one)["engines"]:
                assert time.monotonic() < deadline, read_topology(two_nodes_of_one)
                time.sleep(0.5)
        check_no_leftovers(two_nodes_of_one)
        assert os.listdir(sockets) == []


@pytest.mark.slow
def test_a_supervisor_of_servers_that_fail_fails_too(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """vLLM refuses such servers for a dense model. The supervisor ends all of them, and looks at no exit code."""
    ports = ("--data-parallel-multi-port-external-lb", "--data-parallel-size", "2", "--data-parallel-size-local", "2")
    with create_server(two_nodes_of_two, DENSE, tmp_path / "log", *ports) as server:
        wait_for_server_exit(server, START_LIMIT_S)
    log = (tmp_path / "log").read_text()
    assert "Non-MoE models do not support" in log and "VRA-386: a data parallel server has ended" in log


CRASHING_RANK = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM
try:
    LLM(model=sys.argv[1], dtype="float32", tensor_parallel_size=2, pipeline_parallel_size=2, enforce_eager=True,
        distributed_executor_backend="ray", max_model_len=256, kv_cache_memory_bytes=16 << 20,
        worker_extension_cls="tests.e2e.crash_extension.CrashOnImport")
except Exception as error:
    print("FAILED", type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_worker_dies_while_it_starts(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    """The first failure is reported, not those that it causes in the other ranks."""
    done = run_on_head(two_nodes_of_two, "-c", CRASHING_RANK, str(DENSE), E2E_CRASH_MARK=str(tmp_path / "dying"))
    assert "FAILED WorkerDiedError VRA-322: Worker process" in done.stdout, (done.stdout + done.stderr)[-4000:]
    check_no_leftovers(two_nodes_of_two)
