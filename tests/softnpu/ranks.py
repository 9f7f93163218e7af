"""Starts the processes of a communicator for a test, and collects what they did."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Rank:
    """How one rank is started: its number, variables of its own, and a command in front of Python's."""

    number: int
    variables: Mapping[str, str] | None = None
    prefix: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """Exit code and all output of one rank."""

    code: int
    output: str


def run_ranks(
    worker: str,
    scenario: str,
    ranks: int | Sequence[Rank],
    folder: Path,
    variables: Mapping[str, str] | None = None,
    limit: float = 240,
    size: int | None = None,
) -> list[Outcome]:
    """Run `worker` (a module beside this one) once for each rank; fails when one has not ended after `limit` seconds.

    `folder` is shared by the ranks; `size` is the world size that they get, if not all of them are started.
    """
    members = [Rank(number) for number in range(ranks)] if isinstance(ranks, int) else list(ranks)
    folder.mkdir(parents=True, exist_ok=True)
    # Nodes are distinguished by their network namespaces, unless a test names them.
    base = {name: value for name, value in os.environ.items() if name != "SOFTNPU_NODE"}
    base |= {"SOFTNPU_STATE_DIR": str(folder), "WORLD_SIZE": str(size or len(members)), "TEST_FOLDER": str(folder)}
    base |= variables or {}
    processes: list[subprocess.Popen[bytes]] = []
    for member in members:
        own = base | {"RANK": str(member.number)} | dict(member.variables or {})
        command = [*member.prefix, sys.executable, "-m", f"tests.softnpu.{worker}", scenario]
        with open(folder / f"rank{member.number}.log", "wb") as log:
            processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    deadline = time.monotonic() + limit
    hanging = []
    for member, process in zip(members, processes, strict=True):
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            hanging.append(member.number)
            process.kill()
            process.wait()
    logs = [(folder / f"rank{member.number}.log").read_text(errors="replace") for member in members]
    outcomes = [Outcome(process.returncode, text) for process, text in zip(processes, logs, strict=True)]
    assert not hanging, f"ranks {hanging} did not end within {limit} s\n{listed(outcomes)}"
    return outcomes


def listed(outcomes: Sequence[Outcome]) -> str:
    """Return exit codes and outputs, for an error message."""
    return "\n".join(f"--- exit code {each.code}\n{each.output[-4000:]}" for each in outcomes)


def succeeded(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the outputs, if every rank ended well; else fails with all of them."""
    assert all(outcome.code == 0 for outcome in outcomes), listed(outcomes)
    return [outcome.output for outcome in outcomes]
