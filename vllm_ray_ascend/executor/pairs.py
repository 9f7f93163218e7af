"""The connections between neighbouring pipeline stages, made before the first request and not by it."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.errors import PipelinePairError


def neighbours(size: int) -> list[tuple[int, int]]:
    """The pairs of a pipeline of ``size`` stages, in the one order in which all stages connect them."""
    return [(stage, stage + 1) for stage in range(size - 1)]


def connect_pairs(worker: Any) -> None:
    """Send a small tensor both ways between neighbouring stages. Called in every worker, as a collective_rpc.

    torch_npu makes a pair's HCCL communicator at its first send or receive: in the first forward pass, were it not for
    this, where a failure has no name (vllm-ascend #1704, #2712). A common order keeps stages from waiting in a ring.
    """
    import torch
    from torch import distributed
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    own = group.rank_in_group
    for pair in neighbours(group.world_size):
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
            raise PipelinePairError(
                failure(pair, ranks, current().communicator, error, current().explain(error))
            ) from error


def failure(
    pair: tuple[int, int], ranks: tuple[int, ...], communicator: str, error: Exception, explanation: str | None
) -> str:
    """What to say of a pair that cannot be connected."""
    remedy = explanation or "Look for the first error in the logs of both ranks."
    return (
        f"Pipeline stages {pair[0]} and {pair[1]} (ranks {ranks[0]} and {ranks[1]}) cannot be connected by "
        f"{communicator}: {error}\n{remedy}"
    )
