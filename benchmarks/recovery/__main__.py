"""`make bench-recovery`: kill processes of data parallel ranks of a server. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, make_shape

from benchmarks.machine import start_run
from benchmarks.options import RESULTS
from benchmarks.recovery.clients import Client, wait_for_answer
from benchmarks.recovery.figures import figures, markdown, problems
from demo.cluster import to_npu_cluster
from demo.options import Options
from demo.server import Server
from demo.train.recitation import DENSE

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = ("worker", "engine core", "raylet")
PHASES = ("idle", "prefill", "decode")
_PORT = 8000
_NPUS = (0, 1, 1, 1)
"""Of each node: the server's has none, so that every rank's node may be lost; one node is free."""
_AT_ONCE = 4
"""Requests of the rank that is killed."""
_NOTICE_S = 2.0
"""After a raylet its processes end, within a moment in which they may answer."""
_ARGUMENTS = (
    *("--tensor-parallel-size", "1", "--pipeline-parallel-size", "1", "--data-parallel-size", "2"),
    *("--data-parallel-size-local", "0", "--data-parallel-backend", "ray", "--api-server-count", "1"),
    *("--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(32 << 20), "--enforce-eager"),
)


def main(arguments: Sequence[str]) -> int:
    """Run, and write NAME.json and NAME.md; the exit code is 1 where the other rank paused or failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery")
    parser.add_argument("--processes", nargs="+", choices=PROCESSES, default=PROCESSES)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--baseline-s", type=float, default=8.0, help="seconds before each loss to compare with")
    parser.add_argument("--name", default="recovery", help="name of the result")
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {
        **start_run(),
        "losses": [],
    }
    shape = make_shape(len(_NPUS), _NPUS, 4, "1G", manager.choose_node_kind()[0])
    cluster, _ = manager.up(f"recovery-{os.getpid() % 100000}", shape, report=lambda _: None)
    try:
        for process, phase in itertools.product(options.processes, options.phases):
            kill_in_turn(cluster, process, phase, options, run["losses"])
    finally:
        manager.down(cluster.name)
        wanted = len(options.processes) * len(options.phases) * len(options.ranks)
        run["problems"] = problems(run["losses"], wanted)
        (RESULTS / f"{options.name}.json").write_text(json.dumps(run, indent=1) + "\n")
        (RESULTS / f"{options.name}.md").write_text(markdown(run))
    print(markdown(run))
    return 1 if run["problems"] else 0


def kill_in_turn(
    cluster: Cluster, process: str, phase: str, options: argparse.Namespace, losses: list[dict[str, Any]]
) -> None:
    """Serve, and kill ``process`` of each rank in ``phase``; add the figures to ``losses``.

    Each pair has a server of its own: a rank that is lost again is started after a delay.
    """
    npu_cluster = to_npu_cluster(cluster, {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_RAY_ASCEND_RECOVER": "1"})
    log = ROOT / ".demo" / f"{options.name}-{process.replace(' ', '-')}-{phase}.log"
    with Server(Options(str(DENSE), _PORT, _ARGUMENTS, once=True, npus=2), npu_cluster, log) as server:
        server.wait_until_healthy()
        for rank in options.ranks:
            found = lose(cluster, server.url, process, phase, rank, options.baseline_s)
            losses.append({"process": process, "phase": phase, "rank": rank, **found})
            print(json.dumps(losses[-1]), flush=True)
            server.check()


def lose(cluster: Cluster, url: str, process: str, phase: str, rank: int, baseline_s: float) -> dict[str, Any]:
    """Kill a process of a rank, wait until the rank is back, and return the figures."""
    for each in (0, 1):
        wait_for_answer(url, DENSE.name, each)
    node, pids = find_rank(cluster, rank)
    kind, threads = (phase, _AT_ONCE) if phase != "idle" else ("short", 0)
    with (
        Client(url, DENSE.name, 1 - rank, "short", 1) as other,
        Client(url, DENSE.name, rank, kind, threads) as client,
    ):
        time.sleep(baseline_s)
        killed_at = time.monotonic()
        command = ["pkill", "-KILL", "-f", "/raylet/raylet "] if process == "raylet" else ["kill", "-9", pids[process]]
        subprocess.run(manager.node_command(cluster, node, command), check=True, timeout=60)
        if process == "raylet":
            time.sleep(_NOTICE_S)
        back_at = wait_for_answer(url, DENSE.name, rank)
    if process == "raylet":
        manager.restart_ray(cluster, node)
    return figures(killed_at, baseline_s, back_at, client.answers, other.answers)


def find_rank(cluster: Cluster, rank: int) -> tuple[int, dict[str, str]]:
    """Return the index of a data parallel rank's node, and there the process ids of its worker and its engine core."""
    command = [sys.executable, "-m", "vllm_ray_ascend.cli.main", "topology", "--json"]
    done = subprocess.run(
        manager.node_command(cluster, 1, command),
        env=manager.command_environment(cluster, 1, os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (engine,) = (each for each in json.loads(done.stdout)["engines"] if each["dp_rank"] == rank)
    index = {node.address: node.index for node in cluster.nodes}
    return index[engine["address"]], {"engine core": str(engine["pid"]), "worker": str(engine["ranks"][0]["pid"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
