"""Placement groups: granted within a limit, or refused with nothing left behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ray_ascend.cluster.placement import NodeNpus
from vllm_ray_ascend.cluster.resources import live_nodes
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import PlacementError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


class Wanted(NamedTuple):
    """A placement group to be made: its name, its bundles of resources, Ray's strategy for them."""

    name: str
    bundles: list[dict[str, float]]
    strategy: str


def reserve(wanted: Sequence[Wanted], limit_s: float) -> list[PlacementGroup]:
    """Make all groups and wait until each is granted, ``limit_s`` seconds in all. vLLM alone would wait half an hour.

    Raises PlacementError when one is not granted; then none is left.
    """
    import ray

    deadline = time.monotonic() + limit_s
    groups: list[PlacementGroup] = []
    try:
        for name, bundles, strategy in wanted:
            groups.append(ray.util.placement_group(bundles, strategy=strategy, name=name))
        for group, each in zip(groups, wanted, strict=True):
            left = max(1, math.ceil(deadline - time.monotonic()))  # Ray cuts off fractions of a second
            if not group.wait(left):
                raise PlacementError(
                    f"Ray did not grant placement group {each.name} ({_text(each.bundles)}, {each.strategy}) within "
                    f"{limit_s:g} s, although all of it was free a moment before: another engine took it, or the "
                    "nodes lack CPUs. `ray status` and `vllm-ray-ascend topology` show who holds what; start again."
                )
    except BaseException:
        release(groups)
        raise
    return groups


def release(groups: Iterable[PlacementGroup]) -> None:
    """Give the groups' NPUs back. Nothing happens for those already removed, or once Ray is shut down."""
    import ray

    for group in groups:
        if ray.is_initialized():
            ray.util.remove_placement_group(group)


def free_npus(kind: Kind = NPU) -> list[NodeNpus]:
    """Every live node's whole NPUs, or GPUs, free and in all, as Ray counts them now, by address: its order varies."""
    import ray

    from vllm_ray_ascend.compat.ray_state import available_per_node

    nodes = live_nodes(ray.nodes(), available_per_node(), kind)
    return [NodeNpus(node.address, free=int(node.free), total=int(node.npus)) for node in nodes]


def free_in_bundles(group: PlacementGroup, kind: Kind = NPU) -> list[float]:
    """Accelerators that are still free in each bundle of a granted group, by bundle index."""
    from vllm_ray_ascend.compat.ray_state import available_per_node

    free = [0.0] * len(group.bundle_specs)
    for resources in available_per_node().values():
        for index in range(len(free)):
            free[index] += resources.get(f"{kind.key}_group_{index}_{group.id.hex()}", 0.0)
    return free


def _text(bundles: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join("{" + ", ".join(f"{name}: {amount:g}" for name, amount in each.items()) + "}" for each in bundles)
