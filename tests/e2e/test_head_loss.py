"""Ray's head (GCS) dies while an engine serves: its end, and its survival where the head's storage does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from ray._private.node import Node
from softnpu.cluster import manager, processes
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.servers import check_text, create_server, opened_npus, temporary_cluster
from tests.e2e.test_death import (
    LIMIT_S,
    check_no_leftovers,
    leftover_shared_memory,
    wait_for_server_exit,
    wait_until,
)
from tests.faults.inject import Injector

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

PIPELINE = ("--tensor-parallel-size", "1", "--pipeline-parallel-size", "2")
RECONNECT_S = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""After so many seconds without a head Ray ends the processes of its cluster, 60 by default."""


@contextlib.contextmanager
def serving(log: Path, head_settings: Mapping[str, str], **variables: str) -> Iterator[tuple[Cluster, Server, Path]]:
    """Yield a cluster, a healthy server over both of its nodes, and the folder of its sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="head-") as sockets,  # the path of a socket has to be short
        temporary_cluster("e2e-head-loss", 2, 1, {1: {**variables, **head_settings}, 2: variables}) as cluster,
        create_server(cluster, DENSE, log, *PIPELINE, VLLM_RPC_BASE_PATH=sockets, **variables) as server,
    ):
        server.wait_until_healthy()
        yield cluster, server, Path(sockets)


def head_process(cluster: Cluster) -> int:
    """Return the pid of the head's `gcs_server`, as this machine counts it."""
    (pid,) = (
        pid for pid in processes.find_cluster_processes(cluster) if processes.get_process_name(pid) == "gcs_server"
    )
    return pid


def test_the_loss_of_the_head_is_the_reported_cause(tmp_path: Path) -> None:
    """Requests go on, until the engine ends in order before Ray ends its processes."""
    with serving(tmp_path / "log", {}, **{RECONNECT_S: "20"}) as (cluster, server, sockets):
        os.kill(head_process(cluster), signal.SIGKILL)
        check_text(server, DENSE, 1)
        wait_for_server_exit(server)
        log = server.log.read_text()
        assert f"VRA-362: Ray's head (GCS) at {cluster.ray_address} does not answer" in log
        assert f"VRA-388: the engine ends because Ray's head (GCS) at {cluster.ray_address} has been gone for" in log
        assert "VRA-351: the engine of this server failed: exit code 1" in log
        wait_until(lambda: Injector(cluster, tmp_path).list_processes() == [], server)
        assert opened_npus(cluster) == {}
        assert leftover_shared_memory(cluster) == []
        assert list(sockets.iterdir()) == []


@contextlib.contextmanager
def restarted_head(cluster: Cluster, log: Path, command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Run the head's process again, with the command that Ray had started it with, as an operator of pods does."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            manager.node_command(cluster, 1, command), env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        os.kill(head_process(cluster), signal.SIGKILL)  # it shuts down in order only where all else lives
        process.wait(LIMIT_S)


@pytest.mark.skipif(not hasattr(Node, "_is_rocksdb_gcs"), reason="this Ray's head stores its tables in Redis only")
def test_an_engine_outlives_a_head_that_comes_back(tmp_path: Path) -> None:
    """Ray's GCS fault tolerance, with the head's tables on disk; Redis would need a server of its own."""
    durable = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    with serving(tmp_path / "log", durable) as (cluster, server, _):
        pid = head_process(cluster)
        command, variables = (read_strings(pid, name) for name in ("cmdline", "environ"))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "VRA-362: Ray's head (GCS) at" in server.log.read_text(), server)
        check_text(server, DENSE, 1)
        environment = dict(variable.split("=", 1) for variable in variables)
        with restarted_head(cluster, tmp_path / "head.log", command, environment):
            wait_until(lambda: f"VRA-363: Ray's head (GCS) at {cluster.ray_address}" in server.log.read_text(), server)
            check_text(server, DENSE, 1)
            server._process.send_signal(signal.SIGINT)
            assert server._process.wait(LIMIT_S) == 0
            check_no_leftovers(cluster)


def read_strings(pid: int, name: str) -> list[str]:
    """Return the strings of /proc/PID/NAME."""
    return Path(f"/proc/{pid}/{name}").read_text().rstrip("\0").split("\0")
