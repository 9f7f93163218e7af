"""Who runs where: nodes, their NPUs, the engines' ranks and bundles. Pure; `vllm-ray-ascend topology` shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord
from vllm_ray_ascend.devices.cards import Die, cards_shared, die_name
from vllm_ray_ascend.devices.kind import KINDS, NPU, Kind
from vllm_ray_ascend.devices.owners import Claim


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that has an NPU."""

    engine: str
    dp_rank: int
    rank: int
    bundle: int
    pid: int


class Npu(msgspec.Struct, frozen=True, kw_only=True):
    """One NPU of a node by its physical number, and its owners: none, one, or several that share it.

    ``name`` also says its card, where a card has several dies.
    """

    physical: int
    name: str
    owners: tuple[Owner, ...]


class NodeTopology(msgspec.Struct, frozen=True, kw_only=True):
    """One live node, and its NPUs or, where it has none, its GPUs (``device``).

    ``free`` is what Ray can still give; ``others`` is held there by somebody who is no engine.
    """

    address: str
    hostname: str
    declared: float
    free: float
    visible: str | None
    others: float
    npus: tuple[Npu, ...]
    shared_cards: dict[int, list[str]]
    device: str = NPU.key


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A placement group with NPUs or GPUs that belongs to no running engine."""

    group: str
    name: str
    npus: float
    device: str = NPU.key


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """The whole cluster."""

    nodes: tuple[NodeTopology, ...]
    engines: tuple[EngineRecord, ...]
    groups: tuple[Group, ...]


class NodeInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a node: Ray's numbers, and the physical NPUs that are usable there (None: not known)."""

    address: str
    hostname: str
    declared: float
    free: float
    visible: str | None
    usable: tuple[int, ...] | None
    dies: tuple[Die, ...] = ()
    kind: Kind = NPU


def topology(
    nodes: Sequence[NodeInput], engines: Sequence[EngineRecord], group_table: Mapping[str, Mapping[str, Any]]
) -> Topology:
    """The cluster from Ray's nodes, the registry's engines and `ray.util.placement_group_table()`."""
    return Topology(
        nodes=tuple(_node(node, engines) for node in nodes),
        engines=tuple(engines),
        groups=tuple(_foreign(group_table, {engine.group for engine in engines})),
    )


def lines(found: Topology) -> Iterator[str]:
    """The topology as text for people."""
    for node in found.nodes:
        visible = "" if node.visible is None else f", {KINDS[node.device].variable}={node.visible}"
        yield f"node {node.address} ({node.hostname}): {node.declared:g} {node.device}s, {node.free:g} free{visible}"
        for npu in node.npus:
            yield f"  {npu.name:<7} {' + '.join(map(_owner_text, npu.owners)) or '-'}"
        for card, owners in node.shared_cards.items():
            yield f"  card {card} is shared by {' and '.join(owners)}, and so is its bandwidth"
        if node.others:
            yield f"  {node.others:g} of the {node.device}s without a rank are held by others"
    for engine in found.engines:
        places = ", ".join(sorted({rank.address for rank in engine.ranks}))
        yield (
            f"engine {engine.engine}: {engine.model}, data parallel rank {engine.dp_rank}, {len(engine.ranks)} ranks "
            f"on {places}; driver {engine.address} pid {engine.pid}; placement group {engine.group}"
        )
    for group in found.groups:
        number = f"{group.npus:g} {group.device}s"
        yield f"placement group {group.group} ({group.name or 'no name'}): {number}, no engine of ours"
    if not found.engines:
        yield "no engine is running"


def _node(node: NodeInput, engines: Sequence[EngineRecord]) -> NodeTopology:
    owners: dict[int, list[Owner]] = {physical: [] for physical in node.usable or ()}
    held = 0.0
    for engine in engines:
        for rank in engine.ranks:
            if (rank.address, engine.device) == (node.address, node.kind.key):
                owners.setdefault(rank.physical, []).append(_owner(engine, rank))
                held += engine.share
    claimed = [
        Claim(owner=f"engine {owner.engine}", address=node.address, physical=physical)
        for physical, found in owners.items()
        for owner in found
    ]
    return NodeTopology(
        address=node.address,
        hostname=node.hostname,
        declared=node.declared,
        free=node.free,
        visible=node.visible,
        others=max(0.0, node.declared - node.free - held),
        npus=tuple(
            Npu(
                physical=physical,
                name=die_name(node.dies, physical) if node.kind is NPU else f"{node.kind.key} {physical}",
                owners=tuple(owners[physical]),
            )
            for physical in sorted(owners)
        ),
        shared_cards=cards_shared(node.dies, claimed),
        device=node.kind.key,
    )


def _owner(engine: EngineRecord, rank: RankRecord) -> Owner:
    return Owner(engine=engine.engine, dp_rank=engine.dp_rank, rank=rank.rank, bundle=rank.bundle, pid=rank.pid)


def _owner_text(owner: Owner) -> str:
    return f"engine {owner.engine} rank {owner.rank} (bundle {owner.bundle}, pid {owner.pid})"


def _foreign(table: Mapping[str, Mapping[str, Any]], ours: set[str]) -> Iterator[Group]:
    for identity, entry in table.items():
        for key in KINDS:
            number = sum(float(bundle.get(key, 0)) for bundle in entry["bundles"].values())
            if entry["state"] == "CREATED" and number and identity not in ours:
                yield Group(group=identity, name=str(entry.get("name", "")), npus=number, device=key)
