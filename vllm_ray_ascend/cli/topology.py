"""``vllm-ray-ascend topology``: which NPUs of a Ray cluster the ranks of each engine have, and who has the others."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import msgspec

from vllm_ray_ascend.cli.doctor import snapshot_of_joined_cluster
from vllm_ray_ascend.cluster.connect import connect_as_observer
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.probe import probe_cluster
from vllm_ray_ascend.cluster.registry import running_engines
from vllm_ray_ascend.cluster.topology import NodeInput, Topology, build_topology, format_lines
from vllm_ray_ascend.cluster.topology_page import format_page
from vllm_ray_ascend.compat.ray_state import available_resources_per_node, living_actors, running_tasks
from vllm_ray_ascend.compat.versions import RAY_MINIMUM, installed
from vllm_ray_ascend.devices.kind import GPU, NPU
from vllm_ray_ascend.devices.visible import usable_physical_ids
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.errors import DoctorError, RayVersionError

_WATCH_S = 2.0
_CLEAR = "\033[H\033[2J"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("topology", help="nodes, NPUs, owners, ranks and bundles of the running engines")
    parser.add_argument("--address", default="auto", help="the Ray cluster's address (default: that of this node)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as JSON")
    shape.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page, with the findings of doctor")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=_WATCH_S,
        metavar="S",
        help="again every S seconds (default: 2), until Ctrl-C",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the topology, or write the page. Exit code 2 where there is no Ray, or no cluster of it."""
    if installed("ray") is None:
        raise RayVersionError(
            "VRA-143",
            "`vllm-ray-ascend topology` asks a Ray cluster, and Ray is not installed: run it in the environment of a "
            f"node, or pip install 'ray>={RAY_MINIMUM}'.",
        )
    import ray

    connect_as_observer(args.address)
    try:
        _show(args)
        with contextlib.suppress(KeyboardInterrupt):
            while args.watch is not None:
                time.sleep(args.watch)
                _show(args)
    finally:
        ray.shutdown()
    return 0


def _show(args: argparse.Namespace) -> None:
    topology = collect_topology()
    if args.html:
        _write_page(args.html, format_page(topology, _findings(), time.time(), args.watch))
        return
    text = (
        msgspec.json.format(msgspec.json.encode(topology)).decode() if args.json else "\n".join(format_lines(topology))
    )
    is_screen = args.watch is not None and sys.stdout.isatty()
    print(f"{_CLEAR}{text}" if is_screen else text, flush=True)


def _findings() -> list[Finding]:
    """Return what doctor finds at level quick, on the joined cluster."""
    checks = choose_checks("quick")
    return make_report(snapshot_of_joined_cluster(checks), checks).findings


def _write_page(path: Path, page: str) -> None:
    """Write the page in one step, since a browser may be loading it. Raise DoctorError where that is not possible."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise DoctorError("VRA-608", f"{path} cannot be written ({error}). Give --html another FILE.") from error


def collect_topology() -> Topology:
    """Return the topology of the joined cluster."""
    import ray

    nodes, groups = _collect_nodes(), ray.util.placement_group_table()
    actors, engines = living_actors(), running_engines()
    topology = build_topology(nodes, engines, groups, actors)
    if not topology.has_unknown_owners:  # the table of tasks is long
        return topology
    return build_topology(nodes, engines, groups, actors, running_tasks())


def _collect_nodes() -> list[NodeInput]:
    import ray

    facts = probe_cluster()
    available = available_resources_per_node()
    nodes = []
    for row in sorted(ray.nodes(), key=lambda row: (str(row["NodeManagerAddress"]), str(row["NodeID"]))):
        if not row["Alive"]:
            continue
        fact = facts.get(row["NodeID"])
        npu_count = fact.cann_devices if fact else None
        kind = GPU if row["Resources"].get("GPU") and not row["Resources"].get("NPU") and not npu_count else NPU
        usable_ids = usable_physical_ids(fact.visible_devices, npu_count) if fact and npu_count is not None else None
        nodes.append(
            NodeInput(
                address=str(row["NodeManagerAddress"]),
                hostname=str(row["NodeManagerHostname"]),
                declared=float(row["Resources"].get(kind.key, 0)),
                free=float(available.get(row["NodeID"], {}).get(kind.key, 0)),
                visible_devices=fact.visible_devices if fact and kind is NPU else None,
                dies=fact.dies if fact else (),
                usable_ids=None if usable_ids is None else tuple(usable_ids),
                kind=kind,
                node_id=str(row["NodeID"]),
            )
        )
    return nodes
