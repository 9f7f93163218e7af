"""vllm-ascend's MoE layers in an engine whose expert parallel size changes: their kind, and what follows the groups.

vllm-ascend has vLLM's expert load balancing in its second model runner alone, and vLLM has elastic expert parallelism
in its first alone (until 0.32). The layers themselves fit both: they ask the configuration which one it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_dp_group, get_ep_group
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.distributed.parallel_state import get_mc2_group
from vllm_ascend.ops.fused_moe.fused_moe import AscendMoERunner
from vllm_ascend.ops.fused_moe.moe_comm_method import _MoECommMethods, get_moe_comm_method, setup_moe_comm_method

from vllm_ray_ascend import patches

_FACTORY = "vllm_ascend.patch.platform.patch_fused_moe"
_EXPERTS = "vllm_ascend.ops.fused_moe.routed_experts"


def install() -> None:
    """Let MoE layers of this process be of the kind whose experts vLLM can move."""
    for module in (_FACTORY, _EXPERTS):
        patches.apply(f"{module}.get_current_vllm_config", _config_of_second_runner)
    patches.wrap(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner._set_moe_config",
        _with_groups,
        AscendMoERunner,
    )
    patches.apply(
        "vllm_ascend.distributed.eplb.eplb_state.AscendEplbLayerState._set_local_expert_range", _set_local_expert_range
    )
    patches.wrap("vllm_ascend.ops.fused_moe.eplb.build_expert_replica_routing_table", _equal_on_all_ranks)


def rebuild_communication(layers: Iterable[Any]) -> None:
    """Create the communication of MoE ``layers`` again, as their creation does, for the groups now in use.

    vllm-ascend keeps it by the numbers of experts: those of the old size would never be found again.
    """
    _MoECommMethods.clear()
    for layer in layers:
        setup_moe_comm_method(layer.moe_config)
        dispatcher = getattr(get_moe_comm_method(MoECommType.ALLTOALL, layer.moe_config), "token_dispatcher", None)
        expert_ids = getattr(dispatcher, "expert_ids_per_ep_rank", None)
        if expert_ids is not None:
            layer.routed_experts.register_buffer("expert_ids_per_ep_rank", expert_ids, persistent=False)


class _SecondRunnerConfig:
    """A VllmConfig which says that vllm-ascend's second model runner is used."""

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _config_of_second_runner() -> _SecondRunnerConfig:
    return _SecondRunnerConfig(get_current_vllm_config())


def _equal_on_all_ranks(build: Callable[[Any, Any, int], torch.Tensor]) -> Callable[[Any, Any, int], torch.Tensor]:
    """Return `build_expert_replica_routing_table`, whose table is that of rank 0 on all ranks.

    Where tokens are gathered before experts are chosen, each rank chooses for all of them, and computes those whose
    replica is its own: by tables that differ a token is computed by two ranks or by none.
    """

    @functools.wraps(build)
    def build_equal(logical_to_physical_map: Any, logical_replica_count: Any, ep_rank: int) -> torch.Tensor:
        return build(logical_to_physical_map, logical_replica_count, 0)

    return build_equal


def _with_groups(set_config: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return `_set_moe_config`, which keeps what vllm-ascend has added to a layer's configuration."""

    @functools.wraps(set_config)
    def set_config_with_groups(layer: Any, config: Any) -> None:
        config.tp_group = layer.moe_config.tp_group
        config.dp_group, config.ep_group, config.mc2_group = get_dp_group(), get_ep_group(), get_mc2_group()
        set_config(layer, config)
        if layer.ascend_shared_experts is not None:
            layer.ascend_shared_experts.moe_config = config

    return set_config_with_groups


def _set_local_expert_range(state: Any, expert_load_view: torch.Tensor) -> None:
    """Set which physical experts of a layer are this rank's.

    vllm-ascend divides the width of the view, which here has room for the largest size, by the present one.
    """
    config, group = get_current_vllm_config(), get_ep_group()
    experts = config.model_config.get_num_experts() + config.parallel_config.eplb_config.num_redundant_experts
    state.local_expert_count = experts // group.world_size
    state.local_expert_start = group.rank_in_group * state.local_expert_count
