"""Clusters for whole engines: as few as possible, each made once and removed at the end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape

from demo.server import QUIET
from tests.e2e.generate import MARKER

ROOT = Path(__file__).resolve().parents[2]
ENGINE_LIMIT_S = 400
CONTROL_TOKEN = r"token\W+[0-9a-f]{16}"
"""The token in the address of a control server, however often quoted."""


def _cluster(name: str, nodes: int, npus_per_node: int) -> Iterator[Cluster]:
    kind, _ = manager.choose_node_kind()
    beside = os.environ.get("PYTEST_XDIST_WORKER", "")
    cluster, _ = manager.up(name + beside, Shape(nodes=nodes, npus_per_node=npus_per_node, kind=kind))
    yield cluster
    manager.down(cluster.name)


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    """One node with 4 NPUs."""
    yield from _cluster("e2e-one", 1, 4)


@pytest.fixture(scope="module")
def two_nodes_of_one() -> Iterator[Cluster]:
    """Two nodes with an NPU each: two ranks have to be on both."""
    yield from _cluster("e2e-two-one", 2, 1)


@pytest.fixture(scope="module")
def two_nodes_of_two() -> Iterator[Cluster]:
    """Two nodes with 2 NPUs each: four ranks have to be on both."""
    yield from _cluster("e2e-two-two", 2, 2)


def run_on_head(cluster: Cluster, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the cluster's head node, as a user would there, with further environment ``variables``."""
    base = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        manager.node_command(cluster, 1, [sys.executable, *command]),
        env=manager.command_environment(cluster, 1, base),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=ENGINE_LIMIT_S,
    )


def find_logs_with(cluster: Cluster, pattern: str, log: str = "") -> set[str]:
    """Return names of logs that contain ``pattern``: of Ray's processes on every node, and "" for ``log``."""
    texts = {Path(): log}
    for node in cluster.nodes:
        files = [path for path in cluster.temp_dir(node).glob("session_*/logs/**/*") if path.is_file()]
        assert any("worker-" in path.name for path in files), f"no logs of workers in {cluster.temp_dir(node)}"
        texts |= {path: path.read_text(errors="replace") for path in files}
    return {path.name for path, text in texts.items() if re.search(pattern, text)}


def run_generation(cluster: Cluster, options: dict[str, Any], **variables: str) -> tuple[dict[str, Any], str]:
    """Return the result of tests.e2e.generate, and its whole log."""
    done = run_on_head(cluster, "-m", "tests.e2e.generate", json.dumps(options), **variables)
    log = done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and found, f"exit code {done.returncode}\n{log[-6000:]}"
    result: dict[str, Any] = json.loads(found[-1][len(MARKER) :])
    return result, log
