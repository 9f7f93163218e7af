"""`make soak`: a served engine for 30 minutes, with aborts and a slow link at times. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape
from softnpu.cluster.processes import find_cluster_processes

from benchmarks.machine import start_run
from benchmarks.options import RESULTS
from benchmarks.soak.clients import Clients
from benchmarks.soak.figures import growths, markdown
from demo.cluster import to_npu_cluster
from demo.options import Options
from demo.server import Server
from demo.train.recitation import DENSE

ROOT = Path(__file__).resolve().parents[2]
_SLOW = "slow_link:ms=30,mbps=50"
_PORT = 8000
_ENGINE_PROCESSES = ("RayAscendWorkerProc", "VLLM::EngineCore", "VLLM::APIServer", "vllm serve")
_MB = 1 << 20
_END_LIMIT_S = 120.0


def sample(cluster: Cluster, before: Collection[str]) -> dict[str, float]:
    """Return what the engine's processes of all nodes use now, summed, and what is in the nodes' shared memory.

    ``before``: what was there before the engine, as `shared_memory` names it.
    """
    total = dict.fromkeys(("processes", "files", "threads", "memory_mb"), 0.0)
    for pid in find_cluster_processes(cluster):
        try:
            process = psutil.Process(pid)
            if not any(name in " ".join(process.cmdline()) for name in _ENGINE_PROCESSES):
                continue
            total["processes"] += 1
            total["files"] += process.num_fds()
            total["threads"] += process.num_threads()
            total["memory_mb"] += process.memory_full_info().uss / _MB
        except psutil.Error:
            continue
    sizes = [size for name, size in shared_memory(cluster).items() if name not in before]
    return {**total, "shm_files": len(sizes), "shm_mb": sum(sizes) / _MB}


def shared_memory(cluster: Cluster) -> dict[str, int]:
    """Return the sizes in bytes of all files in /dev/shm, by node and name, less the software NPU's own table."""
    listing = "import os,json;print(json.dumps([[e.name,e.stat().st_size] for e in os.scandir('/dev/shm')]))"
    found: dict[str, int] = {}
    for node in cluster.nodes:
        command = manager.node_command(cluster, node.index, [sys.executable, "-c", listing])
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found |= {
            f"{node.hostname}/{name}": size for name, size in json.loads(done.stdout) if not name.startswith("softnpu-")
        }
    return found


def leftovers(cluster: Cluster, before: Collection[str]) -> list[str]:
    """Return what is left of the engine `_END_LIMIT_S` seconds after its end at the latest."""
    deadline = time.monotonic() + _END_LIMIT_S
    while True:
        now = sample(cluster, before)
        left = [f"{now[name]:g} {name}" for name in ("processes", "shm_files") if now[name]]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def main(arguments: Sequence[str]) -> int:
    """Run, and write NAME.json and NAME.md; the exit code is 1 where something hangs, grows, fails or is left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--period-s", type=float, default=120.0, help="the link is slow in the last quarter of each")
    parser.add_argument("--every-s", type=float, default=10.0, help="seconds between two samples of resources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="soak", help="name of the result")
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {
        **start_run(),
        "clients": options.clients,
        "period_s": options.period_s,
        "slow_s": options.period_s / 4,
        "samples": [],
    }
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        faults = Path(folder) / "faults"
        faults.touch()
        settings = {node: {"SOFTNPU_FAULTS": f"@{faults}"} for node in (1, 2)}
        shape = Shape(nodes=2, npus_per_node=2, cpus_per_node=4, kind=manager.choose_node_kind()[0])
        cluster, _ = manager.up(f"soak-{os.getpid() % 100000}", shape, settings=settings, report=lambda _: None)
        try:
            problems = soak(cluster, faults, options, run)
        finally:
            manager.down(cluster.name)
    run["problems"] = problems
    (RESULTS / f"{options.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (RESULTS / f"{options.name}.md").write_text(markdown(run))
    print(markdown(run), *problems, sep="\n")
    return 1 if problems else 0


def soak(cluster: Cluster, faults: Path, options: argparse.Namespace, run: dict[str, Any]) -> list[str]:
    """Serve, load and sample; fill ``run``; return what is wrong."""
    before = shared_memory(cluster)  # of Ray
    npu_cluster = to_npu_cluster(cluster, {**os.environ, "PYTHONPATH": str(ROOT)})
    log = ROOT / ".demo" / f"{options.name}.log"
    with Server(Options(model=str(DENSE), port=_PORT, arguments=(), once=True, npus=4), npu_cluster, log) as server:
        server.wait_until_healthy()
        clients = Clients(server.url, DENSE.name, options.clients, options.seed)
        started = time.monotonic()
        while (passed := time.monotonic() - started) < options.minutes * 60:
            server.check()
            slow = passed % options.period_s > options.period_s * 0.75
            faults.write_text(_SLOW if slow else "")
            run["samples"].append({"seconds": round(passed, 1), "slow": slow, **sample(cluster, before)})
            time.sleep(options.every_s)
        faults.write_text("")
        problems = clients.stop()
        server.check()
    run["seconds"] = round(time.monotonic() - started)
    run["requests"] = {
        **{name: clients.counts[name] for name in ("completed", "right", "aborted", "failed")},
        "longest_gap_s": round(clients.longest_gap_s, 2),
    }
    run["errors"] = clients.errors[:20]
    run["growth"] = [{**each._asdict(), "passed": each.passed} for each in growths(run["samples"])]
    run["leftovers"] = leftovers(cluster, before)
    problems += [f"{each['resource']} grows" for each in run["growth"] if not each["passed"]]
    problems += [f"left over: {each}" for each in run["leftovers"]]
    return problems + [f"failed: {error}" for error in clients.errors[:5]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
