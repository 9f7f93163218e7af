"""Who runs where: nodes, their NPUs, the engines' ranks and bundles. Pure; `vllm-ray-ascend topology` shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_ray_ascend.cluster.device_users import (
    DeviceUser,
    Reservation,
    idle_reservations,
    serve_deployment,
    users_of_node,
)
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, engine_names
from vllm_ray_ascend.compat.ray_state import ActorRecord, TaskRecord
from vllm_ray_ascend.devices.cards import Die, die_name, find_shared_cards
from vllm_ray_ascend.devices.kind import KINDS, NPU, Kind
from vllm_ray_ascend.devices.owners import Claim


class NpuOwner(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that has an NPU."""

    engine: str
    dp_rank: int
    rank: int
    bundle_index: int = msgspec.field(name="bundle")
    pid: int


class Npu(msgspec.Struct, frozen=True, kw_only=True):
    """One NPU of a node, and its owners: none, one, or several that share it.

    ``name`` includes its card, where a card has several dies.
    """

    physical_id: int = msgspec.field(name="physical")
    name: str
    owners: tuple[NpuOwner, ...]


class NodeTopology(msgspec.Struct, frozen=True, kw_only=True):
    """One live node, and its NPUs or, where it has none, its GPUs (``device_key``: "NPU" or "GPU").

    ``node_id`` is Ray's. ``free`` is what Ray can still assign; ``others`` is held there by other users of Ray than
    engines: by ``users``, by ``reservations``, and ``unknown`` by neither.
    """

    address: str
    hostname: str
    declared: float
    free: float
    visible_devices: str | None = msgspec.field(name="visible")
    others: float
    npus: tuple[Npu, ...]
    shared_cards: dict[int, list[str]]
    device_key: str = msgspec.field(name="device", default=NPU.key)
    node_id: str = msgspec.field(name="node", default="")
    users: tuple[DeviceUser, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    unknown: float = 0.0


class OtherPlacementGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A placement group with NPUs or GPUs that belongs to no running engine."""

    group: str
    name: str
    npus: float
    device_key: str = msgspec.field(name="device", default=NPU.key)


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """The whole cluster. ``deployments``: those of Ray Serve in which engines run, by the engine's placement group."""

    nodes: tuple[NodeTopology, ...]
    engines: tuple[EngineRecord, ...]
    groups: tuple[OtherPlacementGroup, ...]
    deployments: dict[str, str] = {}

    @property
    def has_unknown_owners(self) -> bool:
        """Whether NPUs are held by whom is not known."""
        return any(node.unknown for node in self.nodes)


class NodeInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a node: Ray's counts, and the physical ids that are usable there (None: not known).

    ``node_id`` is Ray's: several nodes may have one address.
    """

    address: str
    hostname: str
    declared: float
    free: float
    visible_devices: str | None
    usable_ids: tuple[int, ...] | None
    dies: tuple[Die, ...] = ()
    kind: Kind = NPU
    node_id: str = ""


def build_topology(
    nodes: Sequence[NodeInput],
    engines: Sequence[EngineRecord],
    group_table: Mapping[str, Mapping[str, Any]],
    actors: Sequence[ActorRecord] = (),
    tasks: Sequence[TaskRecord] = (),
) -> Topology:
    """Return the cluster from Ray's nodes, the registry's engines, `ray.util.placement_group_table()` and users."""
    workers = {rank.actor_name for engine in engines for rank in engine.ranks}
    groups = {engine.group: str(group_table.get(engine.group, {}).get("name", "")) for engine in engines}
    names = engine_names(engines)

    def users(node: NodeInput) -> list[DeviceUser]:
        found = users_of_node(node.node_id, node.kind.key, node.usable_ids, actors, tasks, group_table)
        return [user for user in found if not user.name or user.name not in workers]

    return Topology(
        nodes=tuple(_node_topology(node, engines, names, users(node), group_table) for node in nodes),
        engines=tuple(engines),
        groups=tuple(_other_placement_groups(group_table, {engine.group for engine in engines})),
        deployments={group: found for group, name in groups.items() if (found := serve_deployment(name))},
    )


def format_lines(topology: Topology) -> Iterator[str]:
    """Yield the lines of the topology as text for people."""
    addresses, names = Counter(node.address for node in topology.nodes), engine_names(topology.engines)
    for node in topology.nodes:
        node_id = f", Ray node {node.node_id}" if addresses[node.address] > 1 else ""
        device_list = (
            "" if node.visible_devices is None else f", {KINDS[node.device_key].variable}={node.visible_devices}"
        )
        counts = f"{node.declared:g} {node.device_key}s, {node.free:g} free"
        yield f"node {node.address} ({node.hostname}{node_id}): {counts}{device_list}"
        for npu in node.npus:
            users = [str(user) for user in node.users if npu.physical_id in user.physical_ids]
            owners = [_format_owner(owner, names) for owner in npu.owners]
            yield f"  {npu.name:<7} {' + '.join([*owners, *users]) or '-'}"
        for card, sharers in node.shared_cards.items():
            yield f"  card {card} is shared by {' and '.join(sharers)}, and so is its bandwidth"
        yield from _unnumbered_lines(node)
    for engine in topology.engines:
        places = ", ".join(sorted({rank.address for rank in engine.ranks}))
        deployment = topology.deployments.get(engine.group)
        yield (
            f"engine {names[engine.engine, engine.dp_rank]}: {len(engine.ranks)} ranks on {places}; driver "
            f"{engine.address} pid {engine.pid}; placement group {engine.group}"
            f"{f' of {deployment}' if deployment else ''}"
        )
    for group in topology.groups:
        number = f"{group.npus:g} {group.device_key}s"
        yield f"placement group {group.group} ({group.name or 'no name'}): {number}, not of an engine of this plugin"
    if not topology.engines:
        yield "no engine is running"


def _unnumbered_lines(node: NodeTopology) -> Iterator[str]:
    """Yield who holds those NPUs of which Ray does not say which they are."""
    holders = [(user.amount, f"held by {user}") for user in node.users if not user.physical_ids]
    holders += [(each.amount, f"reserved by {each}") for each in node.reservations]
    holders += [(node.unknown, "held by others")] if node.unknown else []
    for amount, holder in holders:
        yield f"  {amount:g} of the {node.device_key}s without an owner: {holder}"


def _node_topology(
    node: NodeInput,
    engines: Sequence[EngineRecord],
    names: Mapping[tuple[str, int], str],
    users: Sequence[DeviceUser],
    group_table: Mapping[str, Mapping[str, Any]],
) -> NodeTopology:
    owners: dict[int, list[NpuOwner]] = {physical_id: [] for physical_id in node.usable_ids or ()}
    held = 0.0
    used: dict[str, float] = {}
    for engine in engines:
        for rank in engine.ranks:
            if rank.is_on(node.node_id, node.address) and engine.device_key == node.kind.key:
                owners.setdefault(rank.physical_id, []).append(_npu_owner(engine, rank))
                held += engine.share
                used[engine.group] = used.get(engine.group, 0.0) + engine.share
    for user in users:
        used[user.group] = used.get(user.group, 0.0) + user.amount
    reservations = tuple(idle_reservations(node.node_id, node.kind.key, group_table, used))
    others = max(0.0, node.declared - node.free - held)
    known = sum(user.amount for user in users) + sum(each.amount for each in reservations)
    claims = [
        (f"engine {names[owner.engine, owner.dp_rank]}", npu)
        for npu, owners_of_npu in owners.items()
        for owner in owners_of_npu
    ]
    claims += [(str(user), npu) for user in users for npu in user.physical_ids]
    claimed = [Claim(owner=owner, address=node.address, physical_id=npu, node_id=node.node_id) for owner, npu in claims]
    return NodeTopology(
        address=node.address,
        hostname=node.hostname,
        declared=node.declared,
        free=node.free,
        visible_devices=node.visible_devices,
        others=others,
        npus=tuple(
            Npu(
                physical_id=physical_id,
                name=die_name(node.dies, physical_id) if node.kind is NPU else f"{node.kind.key} {physical_id}",
                owners=tuple(owners[physical_id]),
            )
            for physical_id in sorted(owners)
        ),
        shared_cards=find_shared_cards(node.dies, claimed),
        device_key=node.kind.key,
        node_id=node.node_id,
        users=tuple(users),
        reservations=reservations,
        unknown=max(0.0, round(others - known, 4)),
    )


def _npu_owner(engine: EngineRecord, rank: RankRecord) -> NpuOwner:
    return NpuOwner(
        engine=engine.engine,
        dp_rank=engine.dp_rank,
        rank=rank.rank,
        bundle_index=rank.bundle_index,
        pid=rank.pid,
    )


def _format_owner(owner: NpuOwner, names: Mapping[tuple[str, int], str]) -> str:
    return (
        f"engine {names[owner.engine, owner.dp_rank]} rank {owner.rank} (bundle {owner.bundle_index}, pid {owner.pid})"
    )


def _other_placement_groups(
    table: Mapping[str, Mapping[str, Any]], own_groups: set[str]
) -> Iterator[OtherPlacementGroup]:
    for group_id, entry in table.items():
        for device_key in KINDS:
            amount = sum(float(bundle.get(device_key, 0)) for bundle in entry["bundles"].values())
            if entry["state"] == "CREATED" and amount and group_id not in own_groups:
                yield OtherPlacementGroup(
                    group=group_id, name=str(entry.get("name", "")), npus=amount, device_key=device_key
                )
