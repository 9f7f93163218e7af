"""``vllm-ray-ascend topology``: which NPUs of a Ray cluster the ranks of each engine have, and who has the others."""

from __future__ import annotations

import argparse

import msgspec

from vllm_ray_ascend.cluster.connect import connect_as_observer
from vllm_ray_ascend.cluster.probe import probe_cluster
from vllm_ray_ascend.cluster.registry import running_engines
from vllm_ray_ascend.cluster.topology import NodeInput, Topology, build_topology, format_lines
from vllm_ray_ascend.compat.ray_state import available_resources_per_node, living_actors, running_tasks
from vllm_ray_ascend.compat.versions import RAY_MINIMUM, installed
from vllm_ray_ascend.devices.kind import GPU, NPU
from vllm_ray_ascend.devices.visible import usable_physical_ids
from vllm_ray_ascend.errors import RayVersionError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("topology", help="nodes, NPUs, owners, ranks and bundles of the running engines")
    parser.add_argument("--address", default="auto", help="the Ray cluster's address (default: that of this node)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the topology. Exit code 2 where there is no Ray, or no cluster of it."""
    if installed("ray") is None:
        raise RayVersionError(
            "VRA-143",
            "`vllm-ray-ascend topology` asks a Ray cluster, and Ray is not installed: run it in the environment of a "
            f"node, or pip install 'ray>={RAY_MINIMUM}'.",
        )
    import ray

    connect_as_observer(args.address)
    try:
        topology = _collect_topology()
    finally:
        ray.shutdown()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(topology)).decode())
    else:
        print("\n".join(format_lines(topology)))
    return 0


def _collect_topology() -> Topology:
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
