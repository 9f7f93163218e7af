"""The connections between neighbouring pipeline stages, made before the first request and not by it."""

from __future__ import annotations

from typing import Any


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
        for sender, receiver in (pair, pair[::-1]):
            tensor = torch.zeros(1, dtype=torch.int32, device=worker.device)
            if own == sender:
                distributed.send(tensor, group.ranks[receiver], group=group.device_group)
            else:
                distributed.recv(tensor, group.ranks[sender], group=group.device_group)
    torch.accelerator.synchronize()
