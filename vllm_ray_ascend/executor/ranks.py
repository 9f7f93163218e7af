"""Where each rank runs, said by the rank itself, and the log line of a healthy start."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.devices.numbering import physical_of_visible
from vllm_ray_ascend.devices.visible import VARIABLE, entries

_ACL = "libascendcl.so"


@dataclass(frozen=True)
class Rank:
    """One worker: its rank in the engine, its node's address, the NPU that it opened, its process."""

    rank: int
    address: str
    visible: int
    physical: int
    pid: int


def report(worker: Any) -> Rank:
    """The facts of ``worker``, in its own process and in the thread that opened its NPU: for collective_rpc."""
    import ray

    visible = _opened_npu()
    return Rank(
        rank=worker.rank,
        address=ray.util.get_node_ip_address(),
        visible=visible,
        physical=_physical(visible),
        pid=os.getpid(),
    )


def ready_line(version: str, stack: Mapping[str, str], ranks: Sequence[Rank]) -> str:
    """The line by which an operator knows a healthy start: versions, nodes, NPUs, and every rank's place."""
    nodes = {rank.address for rank in ranks}
    npus = {(rank.address, rank.physical) for rank in ranks}
    places = ", ".join(
        f"rank {rank.rank} -> {rank.address} NPU {rank.visible} (physical {rank.physical})"
        for rank in sorted(ranks, key=lambda rank: rank.rank)
    )
    versions = ", ".join(f"{name} {number}" for name, number in stack.items())
    return f"vllm-ray-ascend {version} ready: {versions}; {_count(nodes, 'node')}, {_count(npus, 'NPU')}; {places}"


def _count(things: set[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _opened_npu() -> int:
    """Visible index of the NPU that this thread has open, as CANN says."""
    found = ctypes.c_int32(-1)
    code = ctypes.CDLL(_ACL).aclrtGetDevice(ctypes.byref(found))
    if code:
        raise RuntimeError(
            f"aclrtGetDevice failed with CANN error {code}: worker process {os.getpid()} has no NPU open. Its log says "
            "why, just before this; `npu-smi info` shows whether the NPU is healthy."
        )
    return found.value


def _physical(visible: int) -> int:
    """Physical number as CANN says, or by the visible list where CANN is too old to say."""
    ask = getattr(ctypes.CDLL(_ACL), "aclrtGetLogicDevIdByUserDevId", None)
    found = ctypes.c_int32(-1)
    if ask is not None and ask(ctypes.c_int32(visible), ctypes.byref(found)) == 0:
        return found.value
    listed = entries(os.environ.get(VARIABLE))
    return visible if listed is None else physical_of_visible([int(entry) for entry in listed], visible)
