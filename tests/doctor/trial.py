"""How well and how fast doctor works, outside of CI: `python -m tests.doctor.trial [--healthy 50]`, on two nodes.

Each fault is planted alone on one of the nodes and has to be found there; healthy runs have to find nothing. Of many
nodes only what the driver does is measured, decoding and judging their records: they collect at the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time

import msgspec

from tests.doctor.machine import Machine
from tests.softnpu.test_doctor import FIRST, SECOND, Nodes, port_in_use, two_nodes
from vllm_ray_ascend.doctor.collect import decode_record
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.doctor.records import Snapshot
from vllm_ray_ascend.doctor.text import format_report

SIMULATED = 64
PORT_TAKEN = "VRA-677"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--healthy", type=int, default=50, help="runs on healthy nodes")
    options = parser.parse_args()
    print(f"{SIMULATED} nodes: {judging_s(SIMULATED):.2f} s to decode, judge and print", flush=True)
    with tempfile.TemporaryDirectory() as folder, two_nodes(folder) as nodes:
        missed = plant_each(nodes)
        alarms, seconds = run_healthy(nodes, options.healthy)
    print(f"{len(FIRST) + len(SECOND) + 1} faults: {len(missed)} not found {missed or ''}")
    print(
        f"{options.healthy} healthy runs: {alarms} false alarms; {min(seconds):.1f} to {max(seconds):.1f} s, median "
        f"{statistics.median(seconds):.1f} s"
    )
    return 1 if missed or alarms else 0


def plant_each(nodes: Nodes) -> list[str]:
    """Plant each fault alone; return those that were not found on their node, and with a remedy."""
    missed = []
    for node, faults in ((1, FIRST), (2, SECOND)):
        for fault, code in faults.items():
            nodes.install(3 - node, "a2")
            nodes.install(node, fault, "a2")
            missed += report(nodes, node, fault, code)
    nodes.install(2, "a2")
    with port_in_use(nodes, 2):
        missed += report(nodes, 2, "a port of HCCL in use", PORT_TAKEN)
    return missed


def report(nodes: Nodes, node: int, fault: str, code: str) -> list[str]:
    """Run doctor and return the fault where it was not found."""
    _, found = nodes.findings("--level", "full")
    here = [
        each for each in found if each["code"] == code and each["address"] == nodes.address(node) and each["remedy"]
    ]
    others = sorted({each["code"] for each in found} - {code})
    print(f"{fault}: {'found' if here else 'NOT FOUND'}{f', also {others}' if others else ''}", flush=True)
    return [] if here else [fault]


def run_healthy(nodes: Nodes, runs: int) -> tuple[int, list[float]]:
    """Return how many of ``runs`` on healthy nodes found something, and the seconds that each took."""
    for node in (1, 2):
        nodes.install(node, "a2")
    alarms, seconds = 0, []
    for _ in range(runs):
        started = time.monotonic()
        code, found = nodes.findings()
        seconds.append(time.monotonic() - started)
        alarms += bool(code or found)
    return alarms, seconds


def judging_s(count: int) -> float:
    """Return the seconds that the driver needs for the records of ``count`` healthy nodes, once they have arrived."""
    checks = choose_checks("quick")
    arrived = [msgspec.to_builtins(Machine("a2", host=host).record(), str_keys=True) for host in range(1, count + 1)]
    started = time.monotonic()
    nodes = [decode_record(json.loads(json.dumps(record))) for record in arrived]
    snapshot = Snapshot(version="0.1.0", time=time.time(), level="quick", head_address="10.0.0.1:6379", nodes=nodes)
    print(len(list(format_report(make_report(snapshot, checks), colours=False))), "lines")
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
