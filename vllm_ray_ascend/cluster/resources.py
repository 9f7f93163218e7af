"""Does the Ray cluster have the NPUs that an engine needs, and are they free? Pure, over what Ray says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.settings import variable_of


@dataclass(frozen=True)
class Node:
    """One live Ray node and the accelerators that it declares: ``npus`` of the kind in question, and ``free`` ones."""

    address: str
    npus: float
    gpus: float
    free: float = 0.0
    node_id: str = ""


def live_nodes(
    table: Iterable[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]] | None = None,
    kind: Kind = NPU,
) -> list[Node]:
    """The live nodes of `ray.nodes()`, by address. ``available`` are their free resources by node id."""
    nodes = [
        Node(
            address=str(row["NodeManagerAddress"]),
            npus=float(row.get("Resources", {}).get(kind.key, 0)),
            gpus=float(row.get("Resources", {}).get("GPU", 0)),
            free=float((available or {}).get(row["NodeID"], {}).get(kind.key, 0)),
            node_id=str(row["NodeID"]),
        )
        for row in table
        if row.get("Alive")
    ]
    return sorted(nodes, key=lambda node: node.address)


def total_npus(nodes: Sequence[Node]) -> float:
    """NPUs that all ``nodes`` declare."""
    return sum(node.npus for node in nodes)


def check_npus(
    nodes: Sequence[Node],
    needed: int,
    sizes: Mapping[str, int],
    visible: str | None = None,
    untold: Sequence[str] = (),
    kind: Kind = NPU,
) -> None:
    """Raise ClusterResourceError where ``nodes`` declare fewer than ``needed`` NPUs.

    ``sizes`` are the options whose product is ``needed``; the message quotes them,
    and the ASCEND_RT_VISIBLE_DEVICES with which this process runs, ``visible``.
    ``untold`` says of single nodes which NPUs they have without declaring them, and how to mend it.
    """
    total = total_npus(nodes)
    if total >= needed:
        return
    have = ", ".join(f"{node.address}: {node.npus:g}" for node in nodes) or "no live node"
    shortage = f"The engine needs {needed} {kind.key}s ({_product(sizes)}), the Ray cluster has {total:g} ({have})."
    if untold:
        raise ClusterResourceError("\n".join([shortage, *untold]))
    raise ClusterResourceError(f"{shortage} {_remedy(nodes, total, visible, kind)}")


def check_free(
    nodes: Sequence[Node], needed: int, sizes: Mapping[str, int], held: Sequence[str] = (), kind: Kind = NPU
) -> None:
    """Raise ClusterResourceError where fewer than ``needed`` NPUs of ``nodes`` are free; ``held`` says who has them."""
    free = sum(int(node.free) for node in nodes)  # a worker takes a whole one
    if free >= needed:
        return
    each = ", ".join(f"{node.address}: {node.free:g} of {node.npus:g}" for node in nodes if node.npus)
    raise ClusterResourceError(
        f"The engine needs {needed} {kind.key}s ({_product(sizes)}), the Ray cluster has {total_npus(nodes):g}, "
        f"{free} of them free ({each}). Held by {'; '.join(held) or 'nobody that Ray names'}. Stop what holds them, or "
        f"lower these sizes; {variable_of('npu_wait_s')}=SECONDS waits longer for them."
    )


def holders(groups: Iterable[Mapping[str, Any]], nodes: Sequence[Node], kind: Kind = NPU) -> list[str]:
    """Who holds NPUs of ``nodes``: the placement groups, as `ray.util.placement_group_table()` has them, and others."""
    addresses = {node.node_id: node.address for node in nodes}
    rest = {node.address: 0.0 for node in nodes}
    for node in nodes:  # nodes without namespaces share an address
        rest[node.address] += node.npus - node.free
    told = []
    for group in groups:
        held = _held(group, addresses, kind)
        if group.get("state") == "CREATED" and held:
            for address, amount in held.items():
                rest[address] -= amount
            name = group.get("name") or group["placement_group_id"]
            told.append(f"placement group {name} ({_places(held)})")
    rest = {address: amount for address, amount in rest.items() if amount > 1e-3}
    return [*told, *([f"actors or tasks without a placement group ({_places(rest)})"] if rest else [])]


def _held(group: Mapping[str, Any], addresses: Mapping[str, str], kind: Kind) -> dict[str, float]:
    held: dict[str, float] = {}
    for index, bundle in group["bundles"].items():
        address = addresses.get(group["bundles_to_node_id"].get(index, ""))
        if address is not None and bundle.get(kind.key):
            held[address] = held.get(address, 0.0) + float(bundle[kind.key])
    return held


def _places(held: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} on {address}" for address, amount in sorted(held.items()))


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{option} {size}" for option, size in sizes.items())


def _remedy(nodes: Sequence[Node], total: float, visible: str | None, kind: Kind) -> str:
    with_gpus = [node for node in nodes if node.gpus and not node.npus]
    if with_gpus:
        counted = ", ".join(f"{node.address} declares {node.gpus:g} GPU" for node in with_gpus)
        start = f"""`ray start ... --resources='{{"NPU": {with_gpus[0].gpus:g}}}'` without --num-gpus"""
        return f"{counted}: with --num-gpus it is chance whether Ray looks for NPUs. `ray stop` there, then {start}."
    if not total and kind is not NPU:
        return (
            f"No node declares {kind.one}: see that `{kind.list_command}` lists them there, then "
            f"`ray start ... {kind.ray_start(8)}`.{_hint(visible, kind)}"
        )
    if not total:
        return (
            "No node declares an NPU: Ray finds them through CANN's Python module `acl` or /dev/davinci*. Load CANN's "
            """set_env.sh before `ray start`, or declare them: `ray start ... --resources='{"NPU": 8}'`."""
            f"{_hint(visible, kind)}"
        )
    wait = variable_of("npu_wait_s")
    more = "Lower these sizes, or add nodes (`ray start --address=HEAD:PORT`)."
    return f"{more} {wait}=SECONDS waits for a cluster that grows.{_hint(visible, kind)}"


def _hint(visible: str | None, kind: Kind) -> str:
    if not visible:
        return ""
    return (
        f" {kind.variable}={visible} is set here: of its own node Ray counts only {kind.key}s that it names and that "
        "are there."
    )
