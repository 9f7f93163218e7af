"""The placement group of one engine: given and checked, or made here."""

from __future__ import annotations

from typing import Any

from vllm import envs

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.cluster.bundles import check_bundles
from vllm_ray_ascend.cluster.connect import audit_nodes, connect, require_npus, sizes
from vllm_ray_ascend.cluster.groups import Wanted, free_in_bundles, free_npus, reserve
from vllm_ray_ascend.cluster.placement import node_of_process
from vllm_ray_ascend.cluster.waiting import until
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.engine.device_ids import refuse_device_ids
from vllm_ray_ascend.errors import PlacementError
from vllm_ray_ascend.settings import load

_GRANT_LIMIT_S = 30.0
_FRESH_S = 5.0
"""What was just granted, or given back, Ray counts with a delay."""


def place(vllm_config: Any, ray_address: str | None = None) -> Any:
    """Join Ray, check what the engine needs, and make its placement group: returned, and set in the config.

    None where a placement group is given (by data parallelism over Ray, or from outside): that one is checked.
    Raises ClusterResourceError, PlacementError or DeviceMappingError before any actor is created.
    """
    config = vllm_config.parallel_config
    connect(config, ray_address)
    kind = current().kind
    refuse_device_ids(config, kind)
    given = _given(config)
    if given is not None:
        _check(given, config, kind)
        return None
    require_npus(config.world_size, sizes(config), load().npu_wait_s, kind)
    if kind is NPU:
        audit_nodes(None)
    bundle = {kind.key: 1.0, **_pinned(config, kind)}
    wanted = Wanted(f"{vllm_config.instance_id}_dp{config.data_parallel_index}", [bundle] * config.world_size, "PACK")
    (config.placement_group,) = reserve([wanted], _GRANT_LIMIT_S)
    return config.placement_group


def _given(config: Any) -> Any:
    import ray

    return config.placement_group or ray.util.get_current_placement_group()


def _check(group: Any, config: Any, kind: Kind) -> None:
    """Raise PlacementError where the bundles of a group from outside cannot hold the engine."""
    import ray

    if not group.wait(_GRANT_LIMIT_S):
        raise PlacementError(
            f"Placement group {group.id.hex()} was not granted within {_GRANT_LIMIT_S:g} s: the cluster does not have "
            f"what its bundles ask for ({group.bundle_specs}). `ray status` shows what is missing."
        )
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    of_bundle = [str(nodes[index]) for index in range(len(group.bundle_specs))]
    driver = ray.get_runtime_context().get_node_id()
    indices, share = envs.VLLM_RAY_BUNDLE_INDICES or None, envs.VLLM_RAY_PER_WORKER_GPUS

    def check() -> None:
        specs, free = group.bundle_specs, free_in_bundles(group, kind)
        check_bundles(specs, free, config.world_size, indices, share, of_bundle, driver, kind)

    until(check, max(load().npu_wait_s, _FRESH_S))


def _pinned(config: Any, kind: Kind) -> dict[str, float]:
    """What ties an engine that is a process here, and no actor, to this node; nothing for most."""
    if config.data_parallel_size == 1 or config.data_parallel_backend == "ray":
        return {}
    import ray

    address = str(ray.util.get_node_ip_address())
    free = next((node.free for node in free_npus(kind) if node.address == address), 0)
    meeting = config.data_parallel_master_ip
    return node_of_process(config.data_parallel_index, config.world_size, meeting, address, free, kind)
