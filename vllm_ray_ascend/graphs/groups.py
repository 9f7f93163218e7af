"""What the ranks of an engine tell each other about their graphs, on the CPU, and which communicators they have."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.graphs.reasons import Reason

_WEIGHTS = {"fault": 2, "lost": 1}


def vote(reason: Reason | None) -> Reason | None:
    """None where no rank has a reason, else the same one on every rank: a fault if there is any, what was lost
    else, and the lowest rank's.

    Over gloo, since the NPU is what may have failed. All ranks that capture together must call it.
    """
    import torch
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    if world.world_size == 1:
        return reason
    failed = torch.tensor([reason is not None], dtype=torch.int32, device="cpu")
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=world.cpu_group)
    if not failed.item():
        return None
    said: list[Reason | None] = [None] * world.world_size
    dist.all_gather_object(said, reason, group=world.cpu_group)
    return verdict(said)


def verdict(said: list[Reason | None]) -> Reason:
    """What all ranks' reasons come to, by rank. At least one has one."""
    having = [(rank, each) for rank, each in enumerate(said) if each is not None]
    rank, chosen = max(having, key=lambda said: _WEIGHTS.get(said[1].kind, 0))  # the first of the heaviest
    others = len(having) - 1
    more = f", and {others} more rank{'s' if others > 1 else ''}" if others else ""
    return Reason(chosen.kind, f"rank {rank}{more}: {chosen.text}")


def agree_on_least(*values: int) -> tuple[int, ...]:
    """The least of each value over all ranks that capture together."""
    import torch
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    if world.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=world.cpu_group)
    return tuple(map(int, tensor.tolist()))


def is_first() -> bool:
    """Whether this is the rank that speaks for all."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().rank == 0)


class Communicators(NamedTuple):
    """Names of the live groups that have a communicator on NPUs: all of them, and those that graphs talk over."""

    all: list[str]
    in_graphs: list[str]


def communicators() -> Communicators:
    """Those of this rank. HCCL makes one at its first use, and the warm-up before the capture uses what there is.

    Pipeline stages send and receive between graphs, the world's group synchronises: neither is inside of one.
    """
    from vllm.distributed import parallel_state

    outside = (parallel_state._WORLD, parallel_state._PP)
    groups: list[Any] = [reference() for reference in list(parallel_state._groups.values())]
    live = [group for group in groups if group is not None and group.world_size > 1 and _is_made(group)]
    return Communicators(_names(live), _names([group for group in live if group not in outside]))


def _is_made(group: Any) -> bool:
    try:
        backend = group.device_group._get_backend(current().device(group.local_rank))
        return bool(backend.get_hccl_comm_name(group.rank_in_group, init_comm=False))
    except (AttributeError, RuntimeError, TypeError):  # another torch_npu: better counted than forgotten
        return group.device_group is not None


def _names(groups: list[Any]) -> list[str]:
    return sorted(group.unique_name.partition(":")[0] for group in groups)
