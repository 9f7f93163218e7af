"""Run the benchmark of an engine's messages to many nodes. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import start_run
from benchmarks.nodes.process import Ends
from benchmarks.nodes.report import markdown
from vllm_ray_ascend.ipc.relay import Relay, plan_relays
from vllm_ray_ascend.ipc.tcp_queue import TcpQueueWriter

_RESULTS = Path(__file__).resolve().parent.parent / "results"
_HOST = "127.0.0.1"
_PROCESSES = 4
_PAUSE_S = 0.01
_LIMIT_S = 120.0
WAYS = ("ranks", "nodes")
"""A connection to each rank, or one to each node, whose first rank hands on."""


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json and NAME.md; the exit code."""
    parser = argparse.ArgumentParser(prog="make bench-nodes")
    parser.add_argument("--shapes", nargs="+", default=["1x16", "8x8", "64x16"], help="nodes x ranks of a node")
    parser.add_argument("--size", type=int, default=8192, help="bytes of a message")
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--name", default="nodes")
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {
        **start_run(),
        "size": options.size,
        "turns": [],
    }
    for number in range(options.rounds):
        for shape in options.shapes:
            nodes, ranks = map(int, shape.split("x"))
            for way in options.ways:
                turn = {"round": number, "nodes": nodes, "ranks": ranks, "way": way, "load": os.getloadavg()[0]}
                turn |= measure(nodes, ranks, way, options.size, options.messages)
                run["turns"].append(turn)
                (_RESULTS / f"{options.name}.json").write_text(json.dumps(run).replace('{"round"', '\n{"round"') + "\n")
                (_RESULTS / f"{options.name}.md").write_text(markdown(run))
                print(f"round {number}, {shape}, {way}", flush=True)
    print(markdown(run))
    return 0


def measure(nodes: int, ranks: int, way: str, size: int, messages: int) -> dict[str, Any]:
    """Send messages to ``nodes`` nodes beside the writer's, of ``ranks`` ranks each; return seconds of each message."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    groups = [list(range(node * ranks, (node + 1) * ranks)) for node in range(nodes)]
    relays = plan_relays(groups) if way == "nodes" else []
    writer = TcpQueueWriter(_HOST, nodes if relays else nodes * ranks)
    with _processes(writer, relays, groups) as (acks, count):
        for _ in range(nodes if relays else nodes * ranks):
            if not writer.poll(1000 * _LIMIT_S):
                raise TimeoutError("the ranks did not connect")
            writer.recv()
        return _send(writer, acks, count, size, messages)


def _send(writer: TcpQueueWriter, acks: socket.socket, count: int, size: int, messages: int) -> dict[str, Any]:
    wall_s, cpu_s, all_have_s, ranks_cpu_s = [], [], [], []
    part = os.urandom(size)
    own_cpu = time.process_time()
    for _ in range(messages):
        started, started_cpu = time.monotonic(), time.thread_time()
        writer.wait_for_space(None)
        writer.send_multipart([part])
        wall_s.append(round(time.monotonic() - started, 7))
        cpu_s.append(round(time.thread_time() - started_cpu, 7))
        answers = [json.loads(acks.recv(256)) for _ in range(count)]
        all_have_s.append(round(max(at for at, _ in answers) - started, 7))
        ranks_cpu_s.append(sum(cpu for _, cpu in answers))
        time.sleep(_PAUSE_S)
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "all_have_s": all_have_s,
        "writer_cpu_s": (time.process_time() - own_cpu) / messages,
        "ranks_cpu_s": (ranks_cpu_s[-1] - ranks_cpu_s[0]) / max(1, messages - 1),
    }


@contextlib.contextmanager
def _processes(
    writer: TcpQueueWriter, relays: list[Relay], groups: list[list[int]]
) -> Iterator[tuple[socket.socket, int]]:
    """Run the ranks, whole nodes in a process; give the socket of their acknowledgements, and how many processes."""
    count = min(_PROCESSES, len(groups))
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as acks:
        acks.bind(f"{folder}/acks")
        acks.settimeout(_LIMIT_S)
        processes = []
        for number in range(count):
            ranks = [rank for group in groups[number::count] for rank in group]
            ends = msgspec.json.encode(Ends(writer.address, relays, ranks)).decode()
            command = [sys.executable, "-m", "benchmarks.nodes.process", f"{folder}/acks", ends]
            processes.append(subprocess.Popen(command))
        try:
            yield acks, count
        finally:
            writer.close()
            for process in processes:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
