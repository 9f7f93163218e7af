"""Placement groups: granted within a limit, or an error with nothing left behind."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ray_ascend.cluster.dp_placement import NodeNpus
from vllm_ray_ascend.cluster.resources import NodeResources, draining_notes, live_nodes
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import PlacementError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


_NODE_AFFINITY = 0.001
"""So much of a node's "node:IP" resource pins a bundle to it, and lets a thousand be pinned."""
_NODE_ID_LABEL = "ray.io/node-id"


class PlacementGroupSpec(NamedTuple):
    """A placement group to create: its name, its bundles of resources, Ray's strategy for them.

    ``selectors`` are the labels that the node of each bundle has to have; empty: none.
    """

    name: str
    bundles: list[dict[str, float]]
    strategy: str
    selectors: Sequence[dict[str, str]] = ()


def pin_to_nodes(
    spec: PlacementGroupSpec, node_ids: Sequence[str], nodes: Sequence[NodeResources]
) -> PlacementGroupSpec:
    """Return ``spec`` with each bundle pinned to one of ``nodes``, by their ids.

    A node is pinned by the resource that Ray names after its address; where nodes share addresses, by its label too.
    """
    addresses = {node.node_id: node.address for node in nodes}
    bundles = zip(spec.bundles, node_ids, strict=True)
    pinned = [{**bundle, f"node:{addresses[node_id]}": _NODE_AFFINITY} for bundle, node_id in bundles]
    shared = len(set(addresses.values())) < len(addresses)
    selectors = [{_NODE_ID_LABEL: node_id} for node_id in node_ids] if shared else []
    return spec._replace(bundles=pinned, selectors=selectors)


def create_placement_groups(specs: Sequence[PlacementGroupSpec], limit_s: float) -> list[PlacementGroup]:
    """Create all groups and wait until each is granted, ``limit_s`` seconds in all. vLLM alone would wait half an hour.

    Raises PlacementError when one is not granted; then none is left.
    """
    deadline = time.monotonic() + limit_s
    groups: list[PlacementGroup] = []
    try:
        groups += post_placement_groups(specs)
        for group, spec in zip(groups, specs, strict=True):
            remaining_s = max(1, math.ceil(deadline - time.monotonic()))  # Ray cuts off fractions of a second
            if not group.wait(remaining_s):
                raise PlacementError(
                    "VRA-237",
                    f"Ray did not grant placement group {spec.name} ({_format_bundles(spec.bundles)}, {spec.strategy}) "
                    f"within {limit_s:g} s, although all of it was free a moment before: another engine took it, the "
                    "nodes lack CPUs, or what is free are parts of several NPUs. `ray status` and "
                    "`vllm-ray-ascend topology` show who holds what; start again.",
                )
    except BaseException:  # Ctrl-C too: groups without an owner would keep their NPUs
        remove_placement_groups(groups)
        raise
    return groups


def post_placement_groups(specs: Iterable[PlacementGroupSpec]) -> list[PlacementGroup]:
    """Create all groups and wait for none: one that is not granted is a demand, which an autoscaler meets."""
    import ray

    groups: list[PlacementGroup] = []
    try:
        for name, bundles, strategy, selectors in specs:
            labels = {"bundle_label_selector": list(selectors)} if selectors else {}
            groups.append(ray.util.placement_group(bundles, strategy=strategy, name=name, **labels))
    except BaseException:  # Ctrl-C too: groups without an owner would keep their NPUs
        remove_placement_groups(groups)
        raise
    return groups


def remove_placement_groups(groups: Iterable[PlacementGroup]) -> None:
    """Give the groups' NPUs back. Groups that are removed already are skipped, as are all once Ray is shut down."""
    import ray

    for group in groups:
        if ray.is_initialized():
            ray.util.remove_placement_group(group)


def current_nodes(kind: Kind = NPU, demand: Iterable[PlacementGroup] = ()) -> list[NodeResources]:
    """Return the live nodes with their NPUs, or GPUs, as Ray counts them now, ordered by address.

    What groups of a ``demand`` hold counts as free.
    """
    import ray

    from vllm_ray_ascend.compat.ray_state import available_resources_per_node, draining_nodes

    held = npus_of_groups(demand, kind)
    draining = draining_notes(draining_nodes(), time.time())
    nodes = live_nodes(ray.nodes(), available_resources_per_node(), kind, draining)
    return [replace(node, free=node.free + held[node.node_id]) for node in nodes]


def free_npus_per_node(kind: Kind = NPU, demand: Iterable[PlacementGroup] = ()) -> list[NodeNpus]:
    """Return every live node's whole NPUs, or GPUs, free and in all. A node that drains has none free."""
    return [
        NodeNpus(node.address, node.usable_free, int(node.npus), node.draining, node.node_id)
        for node in current_nodes(kind, demand)
    ]


def npus_of_groups(groups: Iterable[PlacementGroup], kind: Kind = NPU) -> dict[str, float]:
    """Return how many NPUs, or GPUs, the bundles of granted ``groups`` hold on each node, by node id."""
    held: defaultdict[str, float] = defaultdict(float)
    for group in groups:
        for bundle_index, node_id in nodes_of_bundles(group).items():
            held[node_id] += group.bundle_specs[bundle_index].get(kind.key, 0)
    return held


def nodes_of_bundles(group: PlacementGroup) -> dict[int, str]:
    """Return the node id of each bundle of a group, by bundle index; none where Ray has not granted the group."""
    import ray

    entry = ray.util.placement_group_table(group)
    return dict(entry["bundles_to_node_id"]) if entry.get("state") == "CREATED" else {}


def free_npus_per_bundle(group: PlacementGroup, kind: Kind = NPU) -> list[float]:
    """Return the accelerators that are still free in each bundle of a granted group, by bundle index."""
    from vllm_ray_ascend.compat.ray_state import available_resources_per_node

    free = [0.0] * len(group.bundle_specs)
    for resources in available_resources_per_node().values():
        for bundle_index in range(len(free)):
            free[bundle_index] += resources.get(f"{kind.key}_group_{bundle_index}_{group.id.hex()}", 0.0)
    return free


def _format_bundles(bundles: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join("{" + ", ".join(f"{name}: {amount:g}" for name, amount in each.items()) + "}" for each in bundles)
