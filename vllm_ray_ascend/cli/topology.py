"""``vllm-ray-ascend topology``: which engine's ranks have which NPUs of a Ray cluster."""

from __future__ import annotations

import argparse

import msgspec

from vllm_ray_ascend.cluster.connect import join
from vllm_ray_ascend.cluster.probe import probe
from vllm_ray_ascend.cluster.registry import running
from vllm_ray_ascend.cluster.topology import NodeInput, lines, topology
from vllm_ray_ascend.compat.ray_state import available_per_node
from vllm_ray_ascend.devices.kind import GPU, NPU
from vllm_ray_ascend.devices.visible import parse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("topology", help="nodes, NPUs, owners, ranks and bundles of the running engines")
    parser.add_argument("--address", default="auto", help="the Ray cluster's address (default: that of this node)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the topology. Exit code 2 where there is no Ray cluster."""
    import ray

    join(args.address)
    try:
        found = topology(_nodes(), running(), ray.util.placement_group_table())
    finally:
        ray.shutdown()
    print(msgspec.json.format(msgspec.json.encode(found)).decode() if args.json else "\n".join(lines(found)))
    return 0


def _nodes() -> list[NodeInput]:
    import ray

    facts = {each.address: each for each in probe()}
    available = available_per_node()
    nodes = []
    for row in sorted(ray.nodes(), key=lambda row: str(row["NodeManagerAddress"])):
        if not row["Alive"]:
            continue
        address = str(row["NodeManagerAddress"])
        fact = facts.get(address)
        count = fact.cann_devices if fact else None
        kind = GPU if row["Resources"].get("GPU") and not row["Resources"].get("NPU") and not count else NPU
        nodes.append(
            NodeInput(
                address=address,
                hostname=str(row["NodeManagerHostname"]),
                declared=float(row["Resources"].get(kind.key, 0)),
                free=float(available.get(row["NodeID"], {}).get(kind.key, 0)),
                visible=fact.visible if fact and kind is NPU else None,
                dies=fact.dies if fact else (),
                usable=tuple(parse(fact.visible, count)) if fact and count is not None else None,
                kind=kind,
            )
        )
    return nodes
