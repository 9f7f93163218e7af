"""Does the Ray cluster have the NPUs that an engine needs, and are they free? Pure, over what Ray reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.devices.kind import NPU, SHARE_VARIABLE, Kind
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.settings import variable_of

_DRAINED = (3, 4)
"""NodeDeathInfo.Reason of Ray: AUTOSCALER_DRAIN_PREEMPTED, AUTOSCALER_DRAIN_IDLE; both of `ray drain-node` too."""

_TOLERANCE = 1e-6
"""Ray counts in ten-thousandths: 0.3333 three times is not quite 1."""


@dataclass(frozen=True)
class NodeResources:
    """One live Ray node and the accelerators that it declares: ``npus`` of the kind in question, and ``free`` ones."""

    address: str
    npus: float
    gpus: float
    free: float = 0.0
    node_id: str = ""
    draining: str = ""
    """Why nothing new is placed on the node; empty where it does not drain."""

    @property
    def usable(self) -> float:
        """The accelerators that an engine may be given, now or once they are released."""
        return 0.0 if self.draining else self.npus

    @property
    def usable_free(self) -> int:
        """The whole ones among them that are free now."""
        return self.count_free(1.0)

    def count_free(self, share: float) -> int:
        """Return how many workers that take ``share`` of one each find room now, if all that is free is contiguous."""
        if self.draining:
            return 0
        return min(math.floor(self.free / share + _TOLERANCE), int(self.npus) * math.floor(1 / share + _TOLERANCE))


def live_nodes(
    table: Iterable[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]] | None = None,
    kind: Kind = NPU,
    draining: Mapping[str, str] | None = None,
) -> list[NodeResources]:
    """Return the live nodes of `ray.nodes()`, by address. ``available`` are their free resources by node id.

    ``draining`` says of nodes that drain, by node id, how long they have.
    """
    nodes = [
        NodeResources(
            address=str(row["NodeManagerAddress"]),
            npus=float(row.get("Resources", {}).get(kind.key, 0)),
            gpus=float(row.get("Resources", {}).get("GPU", 0)),
            free=float((available or {}).get(row["NodeID"], {}).get(kind.key, 0)),
            node_id=str(row["NodeID"]),
            draining=(draining or {}).get(row["NodeID"], ""),
        )
        for row in table
        if row.get("Alive")
    ]
    return sorted(nodes, key=lambda node: node.address)


def draining_notes(deadlines_ms: Mapping[str, int], now_s: float) -> dict[str, str]:
    """Return how long each node that drains has, by node id. Ray's deadlines are in ms since 1970, 0 where none is."""
    return {
        node_id: f"draining, to be gone in {max(0.0, deadline_ms / 1000 - now_s):.0f} s" if deadline_ms else "draining"
        for node_id, deadline_ms in deadlines_ms.items()
    }


def drained_nodes(table: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the reasons of nodes of `ray.nodes()` that drained and are gone, by address, where none has come back."""
    rows = list(table)
    live = {row["NodeManagerAddress"] for row in rows if row.get("Alive")}
    return {
        str(row["NodeManagerAddress"]): str(row.get("DeathReasonMessage") or "no reason given")
        for row in rows
        if not row.get("Alive") and row.get("DeathReason") in _DRAINED and row["NodeManagerAddress"] not in live
    }


def total_npus(nodes: Sequence[NodeResources]) -> float:
    """Return the number of NPUs that all ``nodes`` declare, without nodes that drain."""
    return sum(node.usable for node in nodes)


def leaving_nodes(nodes: Sequence[NodeResources], drained: Mapping[str, str]) -> list[str]:
    """Return a sentence for each node whose accelerators an engine cannot have because it drains or has drained."""
    return [
        *(f"node {node.address} is {node.draining}: its {node.npus:g} are left out" for node in nodes if _leaves(node)),
        *(f"node {address} was drained and is gone ({reason})" for address, reason in drained.items()),
    ]


def _leaves(node: NodeResources) -> bool:
    return bool(node.draining and node.npus)


def check_declared_npus(
    nodes: Sequence[NodeResources],
    needed: int,
    sizes: Mapping[str, int],
    visible_devices: str | None = None,
    findings: Sequence[str] = (),
    kind: Kind = NPU,
    leaving: Sequence[str] = (),
) -> None:
    """Raise ClusterResourceError where ``nodes`` declare fewer than ``needed`` NPUs.

    ``sizes`` are the options whose product is ``needed``; the message quotes them, and the ASCEND_RT_VISIBLE_DEVICES
    with which this process runs, ``visible_devices``. ``findings`` describe single nodes that have NPUs without
    declaring them, each with its remedy; they replace the general advice, as do nodes that drain, the ``leaving``.
    """
    total = total_npus(nodes)
    if total >= needed:
        return
    declared = (
        ", ".join(f"{node.address}: {node.npus:g}{node.draining and f' ({node.draining})'}" for node in nodes)
        or "no live node"
    )
    shortage = (
        f"The engine needs {needed} {kind.key}s ({_format_product(sizes)}), the Ray cluster has {total:g} ({declared})."
    )
    hint = _visible_devices_hint(visible_devices, kind)
    if findings:
        raise ClusterResourceError("VRA-239", "\n".join([shortage, *findings, *leaving]))
    if leaving:
        raise ClusterResourceError(
            "VRA-258",
            f"{shortage} On nodes that drain nothing new is placed: {'; '.join(leaving)}. Add nodes "
            "(`ray start --address=HEAD:PORT`), or lower these sizes.",
        )
    if not total and kind is not NPU:
        raise ClusterResourceError(
            "VRA-241",
            f"{shortage} No node declares {kind.with_article}: check that `{kind.list_command}` lists them there, then "
            f"`ray start ... {kind.ray_start_option(8)}`.{hint}",
        )
    if not total:
        raise ClusterResourceError(
            "VRA-242",
            f"{shortage} No node declares an NPU: Ray finds them through CANN's Python module `acl` or /dev/davinci*. "
            "Load CANN's set_env.sh before `ray start`, or declare them: "
            f"`ray start ... {kind.ray_start_option(8)}`.{hint}",
        )
    raise ClusterResourceError(
        "VRA-243",
        f"{shortage} Lower these sizes, or add nodes (`ray start --address=HEAD:PORT`). "
        f"{variable_of('npu_wait_s')}=SECONDS waits for a cluster that grows.{hint}",
    )


def check_free_npus(
    nodes: Sequence[NodeResources],
    needed: int,
    sizes: Mapping[str, int],
    holders: Sequence[str] = (),
    kind: Kind = NPU,
    share: float = 1.0,
) -> None:
    """Raise ClusterResourceError where fewer than ``needed`` NPUs of ``nodes`` are free; ``holders`` use the others.

    ``share`` is the part of an NPU that each worker takes.
    """
    free = sum(node.count_free(share) for node in nodes)
    if free >= needed:
        return
    each = ", ".join(
        f"{node.address}: {f'{node.usable_free} ({node.draining})' if node.draining else format(node.free, 'g')} of "
        f"{node.npus:g}"
        for node in nodes
        if node.npus
    )
    if share != 1:
        raise ClusterResourceError(
            "VRA-350",
            f"The engine needs {needed} x {share:g} {kind.key} ({_format_product(sizes)}, {SHARE_VARIABLE}={share:g}), "
            f"the Ray cluster has {kind.format_count(total_npus(nodes))} with room for {free} of these shares (free: "
            f"{each}). Held by {'; '.join(holders) or 'unknown to Ray'}. Stop one of them, or give every engine "
            f"a smaller {SHARE_VARIABLE}; {variable_of('npu_wait_s')}=SECONDS waits longer for them.",
        )
    raise ClusterResourceError(
        "VRA-244",
        f"The engine needs {needed} {kind.key}s ({_format_product(sizes)}), the Ray cluster has "
        f"{total_npus(nodes):g}, {free} of them free ({each}). Held by "
        f"{'; '.join(holders) or 'unknown to Ray'}. Stop what holds them, or lower these sizes; "
        f"{variable_of('npu_wait_s')}=SECONDS waits longer for them.",
    )


def npu_holders(groups: Iterable[Mapping[str, Any]], nodes: Sequence[NodeResources], kind: Kind = NPU) -> list[str]:
    """Return who holds NPUs of ``nodes``: the groups of `ray.util.placement_group_table()`, and others."""
    addresses = {node.node_id: node.address for node in nodes}
    rest = {node.address: 0.0 for node in nodes}
    for node in nodes:  # nodes without namespaces share an address
        rest[node.address] += node.npus - node.free
    holders = []
    for group in groups:
        held = _held_by_group(group, addresses, kind)
        if group.get("state") == "CREATED" and held:
            for address, amount in held.items():
                rest[address] -= amount
            name = group.get("name") or group["placement_group_id"]
            holders.append(f"placement group {name} ({_format_amounts(held)})")
    rest = {address: amount for address, amount in rest.items() if amount > 1e-3}
    return [*holders, *([f"actors or tasks without a placement group ({_format_amounts(rest)})"] if rest else [])]


def _held_by_group(group: Mapping[str, Any], addresses: Mapping[str, str], kind: Kind) -> dict[str, float]:
    held: dict[str, float] = {}
    for bundle_index, bundle in group["bundles"].items():
        address = addresses.get(group["bundles_to_node_id"].get(bundle_index, ""))
        if address is not None and bundle.get(kind.key):
            held[address] = held.get(address, 0.0) + float(bundle[kind.key])
    return held


def _format_amounts(held: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} on {address}" for address, amount in sorted(held.items()))


def _format_product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{option} {size}" for option, size in sizes.items())


def _visible_devices_hint(visible_devices: str | None, kind: Kind) -> str:
    if not visible_devices:
        return ""
    return (
        f" {kind.variable}={visible_devices} is set here: of its own node Ray counts only {kind.key}s that it names "
        "and that exist."
    )
