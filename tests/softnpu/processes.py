"""Processes that tests start: Python code with other settings, or beside the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from textwrap import dedent
from typing import Any

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

_nodes = count()
LIMIT = 120  # seconds; generous, because test machines are busy


def variables(changes: dict[str, str | None]) -> dict[str, str]:
    """Return the environment with `changes`; None removes a variable."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run the code in a Python process, with these variables and a node of its own, and wait for it."""
    environment.setdefault("SOFTNPU_NODE", f"{os.environ['SOFTNPU_NODE']}-{next(_nodes)}")
    return subprocess.run(
        [sys.executable, "-c", dedent(code)],
        capture_output=True, text=True, timeout=LIMIT, env=variables(environment), check=False,
    )  # fmt: skip


def check_python(code: str, **environment: str | None) -> str:
    """Run code that must succeed, as run_python does; returns its standard output."""
    done = run_python(code, **environment)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start_python(code: str, **environment: str | None) -> subprocess.Popen[str]:
    """Start the code, by default on the node of the tests; it communicates over standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", dedent(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables(environment),
    )  # fmt: skip


def run_on_node(
    cluster: Cluster, node: int, code: str, *arguments: str, limit_s: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the code on a node of a cluster, with these variables, and wait for it.

    It runs outside the repository: Ray puts the driver's folder first in its workers' sys.path.
    """
    return subprocess.run(
        manager.node_command(cluster, node, [sys.executable, "-c", code, *arguments]),
        env=manager.command_environment(cluster, node, {**os.environ, **environment}),
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def read_result(done: subprocess.CompletedProcess[str]) -> Any:
    """Return what code that must succeed has printed last as "RESULT" and JSON."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT"))
