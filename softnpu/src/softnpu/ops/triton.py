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


REFERENCES: dict[str, dict[str, Callable[..., None]]] = {
    "vllm_ascend.worker.block_table": {"_compute_slot_mapping_kernel": compute_slot_mapping},
}


def replace_kernels(module: ModuleType) -> None:
    """Replace the kernels of ``module`` by the references. Raises RuntimeError if vllm-ascend no longer has one."""
    for name, function in REFERENCES[module.__name__].items():
        if not hasattr(module, name):
            raise RuntimeError(f"vllm-ascend no longer has {module.__name__}.{name}, which the software NPU replaces")
        setattr(module, name, ReferenceKernel(function))
