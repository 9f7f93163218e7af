"""Servers over several nodes, and the truth about their NPUs: what each process opened, asked of the device layer."""

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

from demo.options import Options
from demo.place import place_in
from demo.server import Server
from demo.train.recitation import PROMPTS, zen_after
from tests.e2e.conftest import ROOT, on_head
from tests.e2e.test_serve import free_port
from vllm_ray_ascend.softnpu.cluster import manager
from vllm_ray_ascend.softnpu.cluster.plan import Cluster, Shape

SHORT = PROMPTS[-1]
LEAN = (
    *("--pipeline-parallel-size", "1", "--max-model-len", "512", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(16 << 20), "--enforce-eager", "--api-server-count", "1"),
)
"""Later arguments win: no graphs, little memory, one API server, so that many workers fit this machine."""

_HOLDINGS = """
import json
from vllm_ray_ascend.softnpu.table import holdings
print(json.dumps([[held.pid, held.physical] for held in holdings()]))
"""


@contextlib.contextmanager
def cluster_of(
    name: str, nodes: int, npus_per_node: int, settings: Mapping[int, Mapping[str, str]] | None = None
) -> Iterator[Cluster]:
    """A cluster whose nodes' raylets have the ``settings`` of their index."""
    shape = Shape(nodes=nodes, npus_per_node=npus_per_node, cpus_per_node=4, kind=manager.best_kind()[0])
    cluster, _ = manager.up(name, shape, settings=settings)
    try:
        yield cluster
    finally:
        manager.down(name)


def server_of(cluster: Cluster, model: Path, log: Path, *arguments: str, **variables: str) -> Server:
    """`vllm serve` on the cluster's head node with further environment ``variables``, not waited for."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    options = Options(model=str(model), port=free_port(), arguments=(*LEAN, *arguments), once=True, npus=1)
    return Server(options, place_in(cluster, environ), log)


def opened(cluster: Cluster) -> dict[tuple[str, int], list[int]]:
    """The physical NPUs that each process of each node opened, by the node's address and the process's number there."""
    found: dict[tuple[str, int], list[int]] = {}
    for node in cluster.nodes:
        command = manager.node_command(cluster, node.index, [sys.executable, "-c", _HOLDINGS])
        environment = manager.command_environment(cluster, node.index, os.environ)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        for pid, physical in json.loads(done.stdout):
            found.setdefault((node.address, pid), []).append(physical)
    return found


def npus_by_node(cluster: Cluster) -> dict[int, list[int]]:
    """The physical NPUs in use on each node, by the node's index, one entry for each process that has one."""
    index = {node.address: node.index for node in cluster.nodes}
    result: dict[int, list[int]] = {}
    for (address, _), physical in opened(cluster).items():
        result.setdefault(index[address], []).extend(physical)
    return {node: sorted(physical) for node, physical in sorted(result.items())}


def topology_of(cluster: Cluster) -> dict[str, Any]:
    """What `vllm-ray-ascend topology --json` says on the head node."""
    done = on_head(cluster, "-m", "vllm_ray_ascend.cli.main", "topology", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_topology(cluster: Cluster) -> list[dict[str, Any]]:
    """The topology agrees with the device layer, process by process. Returns its engines."""
    engines: list[dict[str, Any]] = topology_of(cluster)["engines"]
    said = {(rank["address"], rank["pid"]): [rank["physical"]] for engine in engines for rank in engine["ranks"]}
    assert said == opened(cluster)
    actors = [rank["actor"] for engine in engines for rank in engine["ranks"]]
    assert len(set(actors)) == len(actors)
    return engines


def check_text(server: Server, model: Path, dp_size: int) -> None:
    """Every data parallel rank gives the right text."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    for rank in range(dp_size):
        headers = {"X-data-parallel-rank": str(rank)}
        answer = client.completions.create(
            model=model.name, prompt=SHORT, temperature=0, max_tokens=100, extra_headers=headers
        )
        assert answer.choices[0].text == zen_after(SHORT), f"data parallel rank {rank}"
