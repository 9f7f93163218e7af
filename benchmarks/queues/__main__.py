"""Run the benchmark of message queues between two nodes: two network namespaces, joined by a veth pair. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import start_run
from benchmarks.queues.plan import Case, cases_of, read_options
from benchmarks.queues.report import markdown

_RESULTS = Path(__file__).resolve().parent.parent / "results"
_ADDRESSES = ("10.213.7.1", "10.213.7.2")


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json and NAME.md; the exit code."""
    options = read_options(arguments)
    run: dict[str, Any] = {
        **start_run(),
    }
    run["turns"] = []
    with _nodes() as nodes:
        for case in cases_of(options):
            print(f"{case.readers} readers{', one slow' if case.slow else ''}", flush=True)
            run["turns"] += _measure(case, nodes)
            (_RESULTS / f"{options.name}.json").write_text(json.dumps(run).replace('{"readers"', '\n{"readers"') + "\n")
            (_RESULTS / f"{options.name}.md").write_text(markdown(run))
    return 0


def _measure(case: Case, nodes: tuple[str, str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [msgspec.json.encode(case).decode(), _ADDRESSES[0], f"{folder}/acknowledgements"]
        with _process(nodes[0], "writer", arguments) as writer, _process(nodes[1], "readers", arguments) as readers:
            assert writer.stdout is not None
            assert readers.stdin is not None
            readers.stdin.write(writer.stdout.readline())
            readers.stdin.flush()
            return [{"readers": case.readers, "slow": case.slow, **json.loads(line)} for line in writer.stdout]


@contextlib.contextmanager
def _process(node: str, role: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process on a node; it and its children are killed afterwards."""
    command = ["ip", "netns", "exec", node, sys.executable, "-m", "benchmarks.queues.process", role, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.contextmanager
def _nodes() -> Iterator[tuple[str, str]]:
    """Make two network namespaces with an address each; both are removed afterwards."""
    names = (f"bench-queues-{os.getpid()}-a", f"bench-queues-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
