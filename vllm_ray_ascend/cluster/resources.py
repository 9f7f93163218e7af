"""Does the Ray cluster have the NPUs that an engine needs? Pure, over what `ray.nodes()` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.devices.visible import VARIABLE
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.settings import variable_of


@dataclass(frozen=True)
class Node:
    """One live Ray node and the accelerators that it declares."""

    address: str
    npus: float
    gpus: float


def live_nodes(table: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The live nodes of `ray.nodes()`, by address."""
    nodes = [
        Node(
            address=str(row["NodeManagerAddress"]),
            npus=float(row.get("Resources", {}).get("NPU", 0)),
            gpus=float(row.get("Resources", {}).get("GPU", 0)),
        )
        for row in table
        if row.get("Alive")
    ]
    return sorted(nodes, key=lambda node: node.address)


def total_npus(nodes: Sequence[Node]) -> float:
    """NPUs that all ``nodes`` declare."""
    return sum(node.npus for node in nodes)


def check_npus(nodes: Sequence[Node], needed: int, sizes: Mapping[str, int], visible: str | None = None) -> None:
    """Raise ClusterResourceError where ``nodes`` declare fewer than ``needed`` NPUs.

    ``sizes`` are the options whose product is ``needed``; the message quotes them,
    and the ASCEND_RT_VISIBLE_DEVICES with which this process runs, ``visible``.
    """
    total = total_npus(nodes)
    if total >= needed:
        return
    asked = " x ".join(f"{option} {size}" for option, size in sizes.items())
    have = ", ".join(f"{node.address}: {node.npus:g}" for node in nodes) or "no live node"
    shortage = f"The engine needs {needed} NPUs ({asked}), the Ray cluster has {total:g} ({have})."
    raise ClusterResourceError(f"{shortage} {_remedy(nodes, total, visible)}")


def _remedy(nodes: Sequence[Node], total: float, visible: str | None) -> str:
    with_gpus = [node for node in nodes if node.gpus and not node.npus]
    if with_gpus:
        counted = ", ".join(f"{node.address} declares {node.gpus:g} GPU" for node in with_gpus)
        start = f"""`ray start ... --resources='{{"NPU": {with_gpus[0].gpus:g}}}'` without --num-gpus"""
        return f"{counted}: with --num-gpus Ray does not look for NPUs. `ray stop` there, then {start}."
    if not total:
        return (
            "No node declares an NPU: Ray finds them through CANN's Python module `acl` or /dev/davinci*. Load CANN's "
            """set_env.sh before `ray start`, or declare them: `ray start ... --resources='{"NPU": 8}'`."""
            f"{_hint(visible)}"
        )
    wait = variable_of("npu_wait_s")
    more = "Lower these sizes, or add nodes (`ray start --address=HEAD:PORT`)."
    return f"{more} {wait}=SECONDS waits for a cluster that grows.{_hint(visible)}"


def _hint(visible: str | None) -> str:
    if not visible:
        return ""
    return f" {VARIABLE}={visible} is set here: of its own node Ray counts only NPUs that it names and that are there."
