"""The placement group of one engine: a given one is checked, else one is created."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm import envs

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.cluster.bundles import BundleOrder, bundle_share, check_worker_share, held_share, select_bundles
from vllm_ray_ascend.cluster.connect import connect, parallel_sizes, require_npus
from vllm_ray_ascend.cluster.dp_placement import is_tied_by_mp_backend
from vllm_ray_ascend.cluster.node_address import resolve_rendezvous
from vllm_ray_ascend.cluster.placement_groups import (
    PlacementGroupSpec,
    create_placement_groups,
    current_nodes,
    free_npus_per_bundle,
    free_npus_per_node,
    nodes_of_bundles,
    pin_to_nodes,
    remove_placement_groups,
)
from vllm_ray_ascend.cluster.polling import poll_until
from vllm_ray_ascend.cluster.probe import live_node_addresses
from vllm_ray_ascend.cluster.rank_placement import order_bundles, place_groups, rate_placement, straddling_groups
from vllm_ray_ascend.devices.kind import NPU, SHARE_VARIABLE, Kind
from vllm_ray_ascend.devices.owners import reject_device_ids
from vllm_ray_ascend.doctor.before_start import check_cluster, check_nodes, warn_of_nodes
from vllm_ray_ascend.engine.process import node_id
from vllm_ray_ascend.errors import PlacementError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_GRANT_LIMIT_S = 30.0
_RESOURCE_DELAY_S = 5.0
"""Seconds after which Ray counts resources that were just granted or released."""


def create_placement_group(vllm_config: Any, ray_address: str | None = None, wait_s: float | None = None) -> Any:
    """Connect to Ray, check what the engine needs, create its placement group, and set it in the config.

    Wait ``wait_s`` seconds for NPUs, by default as the user has set, or as long as an autoscaler may take.
    Return the group; None where one is given (by data parallelism over Ray, or by the user), which is then checked.
    Raises ClusterResourceError, PlacementError or DeviceMappingError before any actor is created.
    """
    config = vllm_config.parallel_config
    kind = current_accelerator().kind
    check_worker_share(envs.VLLM_RAY_PER_WORKER_GPUS, kind)
    connect(config, ray_address)
    reject_device_ids(getattr(config, "assigned_physical_gpu_ids", None), kind)
    given = _given_group(config)
    if given is not None:
        used = _check_group(given, config, kind)
        if kind is NPU and config.data_parallel_backend != "ray":  # else the manager has checked those of all ranks
            check_nodes(used)
        return None
    name = f"{vllm_config.instance_id}_dp{config.data_parallel_index}"
    share = bundle_share(envs.VLLM_RAY_PER_WORKER_GPUS, config.world_size)
    wanted = PlacementGroupSpec(name, [{kind.key: share}] * config.world_size, "PACK")
    demand = wanted._replace(name=f"{wanted.name}_demand")
    require_npus(config.world_size, parallel_sizes(config), wait_s, kind, [demand], share)
    checked = check_cluster() if kind is NPU else None
    if _must_be_here(config, kind):
        pinned = pin_to_nodes(wanted, [node_id()] * config.world_size, current_nodes(kind))
        (config.placement_group,) = create_placement_groups([pinned], _GRANT_LIMIT_S)
    else:
        config.placement_group = create_group_of_whole_tp_groups(wanted, config.tensor_parallel_size, kind)
    if checked is not None:
        warn_of_nodes(checked, nodes_of_bundles(config.placement_group).values())
    return config.placement_group


def create_group_of_whole_tp_groups(wanted: PlacementGroupSpec, tp_size: int, kind: Kind = NPU) -> Any:
    """Create the placement group ``wanted``, which Ray packs, such that tensor parallel groups are whole on a node.

    Where Ray's choice of nodes is not the best that the free NPUs allow, the group is replaced by one whose bundles
    are pinned. The best may be gone by then: an engine beside this one took it. Ray's choice has to do then.
    """
    (group,) = create_placement_groups([wanted], _GRANT_LIMIT_S)
    driver = node_id()
    nodes = current_nodes(kind, [group])
    free = {node.node_id: node.usable_free for node in nodes}
    best = place_groups(free, tp_size, len(wanted.bundles) // tp_size, driver)
    bundle_nodes = nodes_of_bundles(group)
    granted = [bundle_nodes[index] for index in order_bundles(bundle_nodes, tp_size, len(best) // tp_size, driver)]
    if not best or rate_placement(granted, tp_size, driver) <= rate_placement(best, tp_size, driver):
        return group
    remove_placement_groups([group])
    try:
        return create_placement_groups([pin_to_nodes(wanted, best, nodes)], _RESOURCE_DELAY_S)[0]
    except PlacementError as error:
        logger.info("the best nodes were taken meanwhile, Ray chooses others: %s", error)
        return create_placement_groups([wanted], _GRANT_LIMIT_S)[0]


def has_lost_pinned_bundles(group: Any) -> bool:
    """Return whether ``group`` has lost a node, and is pinned to nodes, so that Ray does not place it again."""
    is_pinned = any(name.startswith("node:") for bundle in group.bundle_specs for name in bundle)
    return is_pinned and len(nodes_of_bundles(group)) < len(group.bundle_specs)


def rank_bundles(group: Any, config: Any) -> list[tuple[int, str, str]]:
    """Return bundle index, node id and address of each rank, as vLLM's get_bundles_sorted_by_node does of each bundle.

    Tensor parallel groups are whole on a node where the bundles allow it; a warning names those that are not.
    """
    kind = current_accelerator().kind
    bundle_nodes = nodes_of_bundles(group)
    share, order = envs.VLLM_RAY_PER_WORKER_GPUS, _bundle_order(group, config)
    chosen = select_bundles(group.bundle_specs, None, config.world_size, None, share, kind, order)
    addresses = live_node_addresses()
    found = [(index, bundle_nodes[index], addresses[bundle_nodes[index]]) for index in chosen]
    _warn_of_straddling_groups([(node, address) for _, node, address in found], config.tensor_parallel_size)
    return found


def _bundle_order(group: Any, config: Any) -> BundleOrder:
    nodes = nodes_of_bundles(group)
    return BundleOrder(
        [nodes[index] for index in range(len(group.bundle_specs))], node_id(), config.tensor_parallel_size
    )


def _warn_of_straddling_groups(places: Sequence[tuple[str, str]], tp_size: int) -> None:
    """Log a warning that names the tensor parallel groups whose ranks, at these node ids and addresses, straddle."""
    addresses = dict(places)
    if straddling := straddling_groups([node for node, _ in places], tp_size):
        groups = "; ".join(
            str(group._replace(nodes=tuple(addresses[node] for node in group.nodes))) for group in straddling
        )
        logger.warning(
            "VRA-255: %d of %d tensor parallel groups are on more than one node, and communicate over the network in "
            "every layer: %s. Whole groups need %d NPUs of a node each: free NPUs (`vllm-ray-ascend topology`), lower "
            "--tensor-parallel-size and raise --pipeline-parallel-size instead, or choose other bundles",
            len(straddling),
            len(places) // tp_size,
            groups,
            tp_size,
        )


def take_share_of_bundles(config: Any) -> None:
    """Let each worker take the part of an NPU that a given group's bundles hold, unless the user has said how much.

    Ray Serve LLM sets the variable in other processes than the engine's.
    """
    if SHARE_VARIABLE in os.environ or config.placement_group is None:
        return
    connect(config)
    kind = current_accelerator().kind
    if (share := held_share(config.placement_group.bundle_specs, kind)) is not None:
        os.environ[SHARE_VARIABLE] = f"{share:g}"
        logger.info("each worker takes %g %s, as its bundle holds (%s)", share, kind.key, SHARE_VARIABLE)


def _given_group(config: Any) -> Any:
    import ray

    return config.placement_group or ray.util.get_current_placement_group()


def _check_group(group: Any, config: Any, kind: Kind) -> set[str]:
    """Return the ids of the nodes of a given group that the engine uses; raise PlacementError where it does not fit."""
    if not group.wait(_GRANT_LIMIT_S):
        raise PlacementError(
            "VRA-314",
            f"Placement group {group.id.hex()} was not granted within {_GRANT_LIMIT_S:g} s: the cluster does not have "
            f"the resources of its bundles ({group.bundle_specs}). `ray status` shows what is missing.",
        )
    order = _bundle_order(group, config)
    indices, share = envs.VLLM_RAY_BUNDLE_INDICES or None, envs.VLLM_RAY_PER_WORKER_GPUS

    def select_free_bundles() -> list[int]:
        specs, free = group.bundle_specs, free_npus_per_bundle(group, kind)
        return select_bundles(specs, free, config.world_size, indices, share, kind, order)

    chosen = poll_until(select_free_bundles, max(load().npu_wait_s, _RESOURCE_DELAY_S))
    if indices:  # vLLM does not ask for the order then
        addresses = live_node_addresses()
        places = [(order.nodes[index], addresses[order.nodes[index]]) for index in chosen]
        _warn_of_straddling_groups(places, order.group_size)
    return {order.nodes[index] for index in chosen}


def _must_be_here(config: Any, kind: Kind) -> bool:
    """Return whether the workers of an engine core that is a process, and no actor, have to be on this node."""
    if config.data_parallel_size == 1 or config.data_parallel_backend == "ray":
        return False
    driver = node_id()
    (here,) = (node for node in free_npus_per_node(kind) if node.node_id == driver)
    rendezvous = resolve_rendezvous(config.data_parallel_master_ip)
    return is_tied_by_mp_backend(
        config.data_parallel_index, config.world_size, rendezvous, here.address, here.free, kind
    )
