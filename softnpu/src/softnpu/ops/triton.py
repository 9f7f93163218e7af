"""References for the Triton kernels that vllm-ascend compiles for an NPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor


class ReferenceKernel:
    """Called like a Triton kernel: kernel[grid](arguments)."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.function(grid, *args, **kwargs)


def compute_slot_mapping(
    grid: tuple[int, ...],
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    block_size: int,
    slots: Tensor,
    *,
    PAD_ID: int = -1,
    TOTAL_CP_WORLD_SIZE: int = 1,
    **unused: object,
) -> None:
    """Fill ``slots`` with the cache slot of each token, from its request's pages, and padding behind the last token."""
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError(f"the software NPU has no context parallelism (size {TOTAL_CP_WORLD_SIZE})")
    starts = query_start_loc[: grid[0]].long()  # one program per request, and one for the padding
    tokens = int(starts[-1])
    requests = torch.repeat_interleave(
        torch.arange(grid[0] - 1, device=slots.device), starts[1:] - starts[:-1], output_size=tokens
    )
    at = positions[:tokens].long()
    slots[tokens:max_num_tokens].fill_(PAD_ID)
    pages = block_table[requests, at // block_size].long()
    slots[:tokens].copy_((pages * block_size + at % block_size).to(slots.dtype))


def map_to_physical(topk_ids: Tensor, routing_table: Tensor) -> Tensor:
    """Return the replica of each token's experts, from the row of the table that is the token's."""
    rows = torch.arange(topk_ids.shape[0], device=topk_ids.device) % routing_table.shape[0]
    experts = topk_ids.long()
    valid = (experts >= 0) & (experts < routing_table.shape[1])
    found = routing_table.index_select(0, rows).gather(1, torch.where(valid, experts, 0))
    return torch.where(valid, found, -1).to(topk_ids.dtype)


def record_expert_tokens(
    expert_tokens: Tensor,
    expert_load: Tensor,
    record_enabled: Tensor,
    group_list_type: int,
    local_expert_start: int,
) -> None:
    """Add the tokens of this rank's experts, given as counts (1) or sums of counts (0), to the load of all."""
    counts = expert_tokens if group_list_type == 1 else torch.diff(expert_tokens, prepend=expert_tokens.new_zeros(1))
    load = expert_load[local_expert_start : local_expert_start + expert_tokens.numel()]
    load.add_((counts * record_enabled).to(load.dtype))


REFERENCES: dict[str, dict[str, object]] = {
    "vllm_ascend.worker.block_table": {"_compute_slot_mapping_kernel": ReferenceKernel(compute_slot_mapping)},
    "vllm_ascend.ops.triton.eplb": {
        "map_to_physical_triton": map_to_physical,
        "record_expert_tokens_triton": record_expert_tokens,
    },
}
"""By module: kernels, and functions that call kernels."""


def replace_kernels(module: ModuleType) -> None:
    """Replace the kernels of ``module`` by the references. Raises RuntimeError if vllm-ascend no longer has one."""
    for name, reference in REFERENCES[module.__name__].items():
        if not hasattr(module, name):
            raise RuntimeError(f"vllm-ascend no longer has {module.__name__}.{name}, which the software NPU replaces")
        setattr(module, name, reference)
