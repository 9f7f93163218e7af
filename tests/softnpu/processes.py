"""Processes that tests start: Python code with other settings, or beside the test."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from textwrap import dedent

_nodes = count()
LIMIT = 120  # seconds; generous, because test machines are busy


def variables(changes: dict[str, str | None]) -> dict[str, str]:
    """The environment with `changes`; None removes a variable."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the code in a Python process, with these variables and a node of its own, and waits for it."""
    environment.setdefault("SOFTNPU_NODE", f"{os.environ['SOFTNPU_NODE']}-{next(_nodes)}")
    return subprocess.run(
        [sys.executable, "-c", dedent(code)],
        capture_output=True, text=True, timeout=LIMIT, env=variables(environment), check=False,
    )  # fmt: skip


def check_python(code: str, **environment: str | None) -> str:
    """Like run_python, for code that must succeed: what it wrote to standard output."""
    done = run_python(code, **environment)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start_python(code: str, **environment: str | None) -> subprocess.Popen[str]:
    """Starts the code, by default on the node of the tests, and returns; it talks over standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", dedent(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables(environment),
    )  # fmt: skip
