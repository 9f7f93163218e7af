"""Data parallelism over Ray: what the command line leaves open is decided where the engine's config is made.

vLLM takes the address of the default route for the ranks' meeting point, which need not be Ray's of this node, and
places all ranks on this node unless --data-parallel-size-local says otherwise.
"""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.addresses import is_same, without_brackets
from vllm_ray_ascend.cluster.connect import connect
from vllm_ray_ascend.cluster.dp_placement import NODES_VARIABLE, DpRequest, fit_local_size
from vllm_ray_ascend.cluster.node_address import choose_master_address, find_nodes
from vllm_ray_ascend.cluster.placement_groups import free_npus_per_node
from vllm_ray_ascend.cluster.probe import live_node_addresses
from vllm_ray_ascend.compat.start_method import force_spawn_after_ray_init
from vllm_ray_ascend.devices.kind import Kind
from vllm_ray_ascend.engine.process import node_id
from vllm_ray_ascend.environment.node import list_interfaces
from vllm_ray_ascend.errors import PlacementError
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)


def complete(config: Any, has_address: bool, is_default_local_size: bool, is_moe: bool) -> None:
    """Set the address at which the ranks meet, and how many of them this node takes, in a ParallelConfig.

    ``has_address``: whether the user chose the address. ``is_moe``: whether the model is one. Joins Ray. Raises
    PlacementError for an address that is not of this node.
    """
    connect(config)
    force_spawn_after_ray_init()
    config.data_parallel_master_ip = master_address(config.data_parallel_master_ip if has_address else "")
    if is_default_local_size and config.data_parallel_size > 1:
        kind = current_accelerator().kind
        local_size = fit_local_size(placement_request(config, kind, is_moe), free_npus_per_node(kind))
        if local_size != config.data_parallel_size_local:
            logger.info("this node takes %d of %d data parallel ranks", local_size, config.data_parallel_size)
        config.data_parallel_size_local = local_size


def master_address(given: str) -> str:
    """Return the address at which the ranks meet, where the user gave this one, or none. Ray must be joined."""
    addresses = live_node_addresses()
    interfaces = [address for _, address in list_interfaces()]
    return choose_master_address(without_brackets(given), addresses[node_id()], interfaces, addresses.values())


def check_master_address(given: str) -> None:
    """Raise PlacementError where ranks of other nodes cannot meet at ``given``, as in a config made without a command.

    Its sockets have this address already.
    """
    fitting = master_address(given)
    if not is_same(fitting, given):
        raise PlacementError(
            "VRA-284",
            f"data_parallel_master_ip={given} of this ParallelConfig is no address at which other nodes reach this "
            f"one. Set it to {fitting}, Ray's address of this node, or make the config by EngineArgs, which does.",
        )


def placement_request(config: Any, kind: Kind, is_moe: bool) -> DpRequest:
    """Return what a ParallelConfig requests of the planner, for a model that ``is_moe`` or not. Ray must be joined."""
    from vllm import envs

    return DpRequest(
        dp_size=config.data_parallel_size,
        dp_size_local=config.data_parallel_size_local,
        world_size=config.world_size,
        master_address=live_node_addresses()[node_id()],
        strategy=getattr(envs, "VLLM_RAY_DP_PACK_STRATEGY", "strict"),
        allowed_addresses=allowed_addresses(),
        all2all_backend=config.all2all_backend,
        kind=kind,
        group_size=config.tensor_parallel_size,
        master_id=node_id(),
        ranks_meet=is_moe,
    )


def allowed_addresses() -> frozenset[str]:
    """Return Ray's addresses of the nodes in VLLM_RAY_DP_PLACEMENT_NODE_IPS, which may name them too."""
    import ray
    from vllm import envs

    entries = filter(None, map(str.strip, getattr(envs, NODES_VARIABLE, "").split(",")))
    return frozenset(find_nodes(entries, ray.nodes()))
