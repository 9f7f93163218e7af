"""Servers over several nodes, and their NPUs as the device layer reports them: which process opened which."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape, make_shape

from demo.cluster import to_npu_cluster
from demo.install import RAY_PACKAGES, install_group
from demo.options import Options
from demo.server import QUIET, Server
from demo.train.recitation import PROMPTS, zen_after
from tests.e2e.conftest import ROOT, run_on_head
from tests.e2e.test_serve import find_free_port

SHORT = PROMPTS[-1]
LEAN = (
    *("--pipeline-parallel-size", "1", "--max-model-len", "512", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(16 << 20), "--enforce-eager", "--api-server-count", "1"),
)
"""No graphs, little memory, one API server, so that many workers fit this machine. Later arguments take precedence."""

PATIENT_SERVE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Serve kills proxies that need longer to start, by default 5 s, and fails then: ActorDiedError on a busy machine."""

_HOLDINGS = """
import json
from softnpu.node_table import read_node_table
print(json.dumps([[held.pid, held.physical] for held in read_node_table()]))
"""


@contextlib.contextmanager
def temporary_cluster(
    name: str, nodes: int, npus: int | tuple[int, ...], settings: Mapping[int, Mapping[str, str]] | None = None
) -> Iterator[Cluster]:
    """Start a cluster whose nodes' raylets have the ``settings`` of their index, and remove it at the end.

    ``npus`` is the number of NPUs of every node, or of each.
    """
    shape = make_shape(nodes, npus, 4, "1G", manager.choose_node_kind()[0])
    cluster, _ = manager.up(name, shape, settings=settings)
    try:
        yield cluster
    finally:
        manager.down(name)


@contextlib.contextmanager
def cluster_with_dashboard(name: str, npus: int, cpus: int = 4) -> Iterator[Cluster]:
    """Start two nodes with Ray's dashboard and what Ray's libraries need, there and in this process's environment."""
    install_group("ray", Path(sys.prefix))
    programs = os.pathsep.join([str(Path(sys.executable).parent), str(RAY_PACKAGES / "bin"), os.environ["PATH"]])
    variables = {
        **PATIENT_SERVE,
        **QUIET,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(RAY_PACKAGES)]),
        "PATH": programs,
    }
    shape = Shape(nodes=2, npus_per_node=npus, cpus_per_node=cpus, kind=manager.choose_node_kind()[0], dashboard=True)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setenv(variable, value)
        cluster, _ = manager.up(name + os.environ.get("PYTEST_XDIST_WORKER", ""), shape)
        try:
            yield cluster
        finally:
            manager.down(cluster.name)


def create_server(cluster: Cluster, model: Path, log: Path, *arguments: str, **variables: str) -> Server:
    """Return `vllm serve` on the cluster's head node with further environment ``variables``, without waiting for it."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    options = Options(model=str(model), port=find_free_port(), arguments=(*LEAN, *arguments), once=True, npus=1)
    return Server(options, to_npu_cluster(cluster, environ), log)


def opened_npus(cluster: Cluster) -> dict[tuple[str, int], list[int]]:
    """Return the physical NPUs that each process opened, by its node's address and its pid on that node."""
    found: dict[tuple[str, int], list[int]] = {}
    for node in cluster.nodes:
        command = manager.node_command(cluster, node.index, [sys.executable, "-c", _HOLDINGS])
        environment = manager.command_environment(cluster, node.index, os.environ)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        for pid, physical in json.loads(done.stdout):
            found.setdefault((node.address, pid), []).append(physical)
    return found


def opened_npus_by_node(cluster: Cluster) -> dict[int, list[int]]:
    """Return the physical NPUs in use on each node, by the node's index, with one entry for each process."""
    index = {node.address: node.index for node in cluster.nodes}
    result: dict[int, list[int]] = {}
    for (address, _), physical in opened_npus(cluster).items():
        result.setdefault(index[address], []).extend(physical)
    return {node: sorted(physical) for node, physical in sorted(result.items())}


def read_topology(cluster: Cluster) -> dict[str, Any]:
    """Return the output of `vllm-ray-ascend topology --json` on the head node."""
    done = run_on_head(cluster, "-m", "vllm_ray_ascend.cli.main", "topology", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_topology(cluster: Cluster) -> list[dict[str, Any]]:
    """Check that the topology agrees with the device layer, process by process. Returns its engines."""
    engines: list[dict[str, Any]] = read_topology(cluster)["engines"]
    reported = {(rank["address"], rank["pid"]): [rank["physical"]] for engine in engines for rank in engine["ranks"]}
    assert reported == opened_npus(cluster)
    actors = [rank["actor"] for engine in engines for rank in engine["ranks"]]
    assert len(set(actors)) == len(actors)
    return engines


def check_text(server: Server, model: Path, dp_size: int) -> None:
    """Check that every data parallel rank generates the right text."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    for rank in range(dp_size):
        headers = {"X-data-parallel-rank": str(rank)}
        answer = client.completions.create(
            model=model.name, prompt=SHORT, temperature=0, max_tokens=100, extra_headers=headers
        )
        assert answer.choices[0].text == zen_after(SHORT), f"data parallel rank {rank}"
