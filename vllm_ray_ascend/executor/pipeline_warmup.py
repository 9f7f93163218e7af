"""Connects neighbouring pipeline stages before the first request, so that the first request does not have to."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.errors import PipelinePairError


def adjacent_stages(size: int) -> list[tuple[int, int]]:
    """Return the pairs of a pipeline of ``size`` stages, in the one order in which all stages connect them.

    Those with an even first stage come first: they are disjoint, and so are the others, so that all pairs of a half
    connect at the same time and the longest pipeline takes as long as one of three stages.
    """
    return [(stage, stage + 1) for first in (0, 1) for stage in range(first, size - 1, 2)]


def connect_pipeline_pairs(worker: Any) -> None:
    """Send a small tensor both ways between neighbouring stages. Called in every worker by collective_rpc.

    torch_npu creates a pair's HCCL communicator at its first send or receive. Without this call that is in the first
    forward pass, where an error does not name the pair (vllm-ascend #1704, #2712). A common order of pairs prevents
    stages from waiting for each other in a ring.

    Raises PipelinePairError where a pair cannot be connected.
    """
    import torch
    from torch import distributed
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    own = group.rank_in_group
    for pair in adjacent_stages(group.world_size):
        if own not in pair:
            continue
        try:
            for sender, receiver in (pair, pair[::-1]):
                tensor = torch.zeros(1, dtype=torch.int32, device=worker.device)
                if own == sender:
                    distributed.send(tensor, group.ranks[receiver], group=group.device_group)
                else:
                    distributed.recv(tensor, group.ranks[sender], group=group.device_group)
            torch.accelerator.synchronize()
        except RuntimeError as error:
            ranks = tuple(group.ranks[stage] for stage in pair)
            accelerator = current_accelerator()
            text = failure_message(pair, ranks, accelerator.dist_backend, error, accelerator.explain_error(error))
            raise PipelinePairError("VRA-313", text) from error


def failure_message(
    pair: tuple[int, int], ranks: tuple[int, ...], communicator: str, error: Exception, explanation: str | None
) -> str:
    """Return which pair cannot be connected, why, and the remedy."""
    remedy = explanation or "Look for the first error in the logs of both ranks."
    return (
        f"Pipeline stages {pair[0]} and {pair[1]} (ranks {ranks[0]} and {ranks[1]}) cannot be connected by "
        f"{communicator}: {error}\n{remedy}"
    )
