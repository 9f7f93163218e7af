"""Where each rank runs, said by the rank itself, and the log line of a healthy start."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.devices.visible import VARIABLE, physical

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
        rank=worker.rpc_rank if worker.worker is None else worker.worker.rank,
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
    return _ask(ctypes.CDLL(_ACL).aclrtGetDevice, "aclrtGetDevice")


def _physical(visible: int) -> int:
    """Physical number: CANN's where it can say (8.3 and later), else by the visible list."""
    ask = getattr(ctypes.CDLL(_ACL), "aclrtGetPhyDevIdByLogicDevId", None)
    if ask is None:
        return physical(os.environ.get(VARIABLE), visible)
    return _ask(ask, "aclrtGetPhyDevIdByLogicDevId", ctypes.c_int32(visible))


def _ask(function: Callable[..., int], name: str, *arguments: Any) -> int:
    answer = ctypes.c_int32(-1)
    code = function(*arguments, ctypes.byref(answer))
    if code:
        raise RuntimeError(f"{name} failed with CANN error {code} in worker process {os.getpid()}")
    return answer.value
