"""Servers that share an NPU, one of which does not know where Ray is; exit codes of servers; a driver without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from softnpu.activate import make_environment
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.cluster import to_npu_cluster
from demo.options import Options
from demo.server import QUIET, Server
from demo.train.recitation import DENSE
from tests.e2e.conftest import ROOT, run_on_head
from tests.e2e.servers import LEAN, check_text, opened_npus, read_topology, temporary_cluster
from tests.e2e.test_bad_input import check_nothing_left
from tests.e2e.test_death import send_signal
from tests.e2e.test_serve import find_free_port

HALF = {"VLLM_RAY_PER_WORKER_GPUS": "0.5"}
LIMIT_S = 180.0
START = """
from vllm import LLM
LLM(model={model!r}, dtype="float32", distributed_executor_backend="ray", enforce_eager=True, max_model_len=256)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with one NPU."""
    with temporary_cluster("e2e-shared", 1, 1) as made:
        yield made


@contextlib.contextmanager
def half_server(cluster: Cluster, log: Path, *prefix: str) -> Iterator[Server]:
    """Start a server on half an NPU, by a relative path of its model, with a ``prefix`` before its command."""
    npu_cluster = to_npu_cluster(cluster, {**os.environ, **QUIET, **HALF, "PYTHONPATH": str(ROOT)})
    prefixed = dataclasses.replace(npu_cluster, command=lambda line: manager.node_command(cluster, 1, [*prefix, *line]))
    arguments = (*LEAN, "--tensor-parallel-size", "1")
    model = os.path.relpath(DENSE)
    with Server(
        Options(model=model, port=find_free_port(), arguments=arguments, once=True, npus=1), prefixed, log
    ) as made:
        made.wait_until_healthy()
        yield made


def start_engine(cluster: Cluster, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_on_head(cluster, "-c", START.format(model=str(DENSE)), **variables)


@pytest.mark.slow
def test_two_servers_share_an_npu_and_end_apart(cluster: Cluster, tmp_path: Path) -> None:
    """The second has no address of Ray: vLLM would start another cluster, whose engine opens the same NPU unseen."""
    with half_server(cluster, tmp_path / "first") as first:
        (first_engine,) = read_topology(cluster)["engines"]
        with half_server(cluster, tmp_path / "second", "env", "-u", "RAY_ADDRESS") as second:
            check_text(second, DENSE, 1)
            assert f"joining the Ray cluster at {cluster.ray_address}" in second.log.read_text()
            assert list(opened_npus(cluster).values()) == [[0], [0]]
            engines = read_topology(cluster)["engines"]
            assert [engine["share"] for engine in engines] == [0.5, 0.5]

            third = start_engine(cluster, VLLM_RAY_ASCEND_NPU_WAIT_S="0", **HALF)
            assert third.returncode != 0
            assert "VRA-350: The engine needs 1 x 0.5 NPU" in third.stderr
            for engine in engines:
                assert f"placement group {engine['engine']}_dp0 (0.5 on {cluster.nodes[0].address})" in third.stderr

            (rank,) = next(each["ranks"] for each in engines if each["engine"] != first_engine["engine"])
            send_signal(cluster, 1, rank["pid"])
            assert second._process.wait(LIMIT_S) == 1
            assert "VRA-351: the engine of this server failed" in second.log.read_text()
        check_text(first, DENSE, 1)
        first._process.send_signal(signal.SIGTERM)
        assert first._process.wait(LIMIT_S) == 0
    check_nothing_left(cluster)


def test_a_driver_on_a_machine_without_ray_gets_the_remedy(cluster: Cluster) -> None:
    """From the host, where no Ray of that cluster runs: it has none of the nodes' addresses."""
    if cluster.shape.kind != "namespaces":
        pytest.skip("nodes share this machine's address: only root can give them their own")
    environ = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.ray_address}
    done = subprocess.run(
        [sys.executable, "-c", START.format(model=str(DENSE))],
        env=make_environment(environ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode != 0
    assert f"`ray start --address={cluster.ray_address}`" in done.stderr


def test_the_address_of_a_client_server_is_refused(cluster: Cluster) -> None:
    # Set in the process: the cluster's own RAY_ADDRESS wins over one of its environment.
    code = 'import os; os.environ["RAY_ADDRESS"] = "ray://head:10001"' + START.format(model=str(DENSE))
    done = run_on_head(cluster, "-c", code)
    assert done.returncode != 0
    assert "VRA-352: RAY_ADDRESS=ray://head:10001 is the address of Ray's client server" in done.stderr
