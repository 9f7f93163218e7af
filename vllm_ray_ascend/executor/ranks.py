"""Where each rank runs, said by the rank itself, and the log line of a healthy start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.devices.kind import NPU


@dataclass(frozen=True)
class Rank:
    """One worker: its rank in the engine, its node's address, the NPU that it opened, its process."""

    rank: int
    address: str
    visible: int
    physical: int
    pid: int
    device: str = NPU.key


def report(worker: Any) -> Rank:
    """The facts of ``worker``, in its own process and in the thread that opened its NPU: for collective_rpc."""
    import ray

    accelerator = current()
    visible = accelerator.opened_device()
    return Rank(
        rank=worker.rank,
        address=ray.util.get_node_ip_address(),
        visible=visible,
        physical=accelerator.physical(visible),
        pid=os.getpid(),
        device=accelerator.kind.key,
    )


def ready_line(version: str, stack: Mapping[str, str], ranks: Sequence[Rank]) -> str:
    """The line by which an operator knows a healthy start: versions, nodes, NPUs, and every rank's place."""
    nodes = {rank.address for rank in ranks}
    npus = {(rank.address, rank.physical) for rank in ranks}
    places = ", ".join(
        f"rank {rank.rank} -> {rank.address} {rank.device} {rank.visible} (physical {rank.physical})"
        for rank in sorted(ranks, key=lambda rank: rank.rank)
    )
    versions = ", ".join(f"{name} {number}" for name, number in stack.items() if number != "not installed")
    device = ranks[0].device if ranks else NPU.key
    return f"vllm-ray-ascend {version} ready: {versions}; {_count(nodes, 'node')}, {_count(npus, device)}; {places}"


def _count(things: set[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
