"""Agreement of an engine's ranks on a failed capture, on the CPU."""

from __future__ import annotations

from vllm_ray_ascend.acl_graphs.capture_errors import FailureCause

_PRIORITY = {"program_error": 2, "device_unusable": 1}
"""Of the kinds that no fallback can help; others have 0."""


def agree_on_failure(cause: FailureCause | None) -> FailureCause | None:
    """Exchange ``cause`` with all ranks; return None where no rank failed, else the same cause on every rank.

    It uses gloo, since the NPU is what may have failed. All ranks that capture together must call it.
    """
    import torch
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    if world.world_size == 1:
        return cause
    failed = torch.tensor([cause is not None], dtype=torch.int32, device="cpu")
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=world.cpu_group)
    if not failed.item():
        return None
    causes: list[FailureCause | None] = [None] * world.world_size
    dist.all_gather_object(causes, cause, group=world.cpu_group)
    return merge_causes(causes)


def merge_causes(causes: list[FailureCause | None]) -> FailureCause:
    """Return the cause that stands for all, given by rank: a program error before an unusable device before the rest,
    then that of the lowest rank. At least one rank must have one."""
    failed = [(rank, cause) for rank, cause in enumerate(causes) if cause is not None]
    rank, chosen = max(failed, key=lambda each: _PRIORITY.get(each[1].kind, 0))  # max returns the first of equals
    others = len(failed) - 1
    more = f", and {others} more rank{'s' if others > 1 else ''}" if others else ""
    return FailureCause(chosen.kind, f"rank {rank}{more}: {chosen.text}")


def is_first_rank() -> bool:
    """Return whether this is the rank that logs for all."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().rank == 0)
