"""Which node each data parallel rank goes to: a plan made before anything is placed. Pure, over what the nodes have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from vllm_ray_ascend.addresses import is_loopback
from vllm_ray_ascend.cluster.rank_placement import place_groups, straddling_groups
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import PlacementError, ShortageError

PACK_VARIABLE = "VLLM_RAY_DP_PACK_STRATEGY"
NODES_VARIABLE = "VLLM_RAY_DP_PLACEMENT_NODE_IPS"
STRATEGIES = ("strict", "fill", "span")
_DEEPEP = ("deepep_high_throughput", "deepep_low_latency")


@dataclass(frozen=True)
class NodeNpus:
    """A live Ray node's whole accelerators of one kind: free now, and in all; ``note``: why none is, if it drains.

    ``node_id`` is Ray's: several nodes may have one address. Without it the address counts.
    """

    address: str
    free: int
    total: int
    note: str = ""
    node_id: str = ""

    @property
    def key(self) -> str:
        """What distinguishes the node from all others."""
        return self.node_id or self.address


@dataclass(frozen=True)
class DpRequest:
    """What the options request: ``dp_size`` ranks of ``world_size`` NPUs, ``dp_size_local`` of them on the master."""

    dp_size: int
    dp_size_local: int
    world_size: int
    master_address: str
    strategy: str = "strict"
    allowed_addresses: frozenset[str] = frozenset()
    """Nodes that may be used besides the master; empty: all."""
    all2all_backend: str = ""
    kind: Kind = NPU
    group_size: int = 1
    """NPUs of a tensor parallel group, of which a rank has one in each pipeline stage."""
    master_id: str = ""
    """Ray's id of the master, which may share its address; empty: the node at ``master_address``."""
    ranks_meet: bool = False
    """Whether ranks connect to each other, at the master's address, so that rank 0 has to be there: those of an MoE."""

    @property
    def master(self) -> str:
        """What distinguishes the master from all other nodes."""
        return self.master_id or self.master_address


@dataclass(frozen=True)
class RankPlacement:
    """Where one data parallel rank goes: the node of each of its NPU bundles, in the order of its workers' ranks.

    ``node_ids`` are Ray's, empty where they are not known.
    """

    dp_rank: int
    local_dp_rank: int
    bundle_addresses: tuple[str, ...]
    node_ids: tuple[str, ...] = ()

    @property
    def bundle_nodes(self) -> tuple[str, ...]:
        """The keys of the bundles' nodes: their ids, or else their addresses."""
        return self.node_ids or self.bundle_addresses

    @property
    def strategy(self) -> str:
        """Ray's strategy for the placement group."""
        return "STRICT_PACK" if len(set(self.bundle_nodes)) == 1 else "PACK"

    def bundles(self, device_key: str = "NPU") -> list[dict[str, float]]:
        """Return the bundles as vLLM addresses them: by rank its workers', at index ``world_size`` the engine's.

        They are not pinned to nodes: see `pins` and cluster/placement_groups.py.
        """
        return [*({device_key: 1.0} for _ in self.bundle_nodes), {"CPU": 1.0}]

    @property
    def pins(self) -> tuple[str, ...]:
        """The key of the node that each of `bundles` belongs to: the engine actor is with the first worker."""
        return (*self.bundle_nodes, self.bundle_nodes[0])


class PlacedRank(NamedTuple):
    """A data parallel rank that already runs, and the node of its engine actor: Ray's id, or else the address."""

    dp_rank: int
    local_dp_rank: int
    node: str


def placed_ranks(bundle_nodes: Sequence[Mapping[int, str]], local_dp_ranks: Sequence[int]) -> list[PlacedRank]:
    """Return the first ranks, in placement groups of others: of each, the nodes of its bundles, the engine's the last.

    A group that is not granted has no nodes: its local rank then counts on none.
    """
    return [
        PlacedRank(dp_rank, local_dp_rank, nodes[max(nodes)] if nodes else "")
        for dp_rank, (nodes, local_dp_rank) in enumerate(zip(bundle_nodes, local_dp_ranks, strict=True))
    ]


class RankPlacementDemand(NamedTuple):
    """What one placement group asks of an autoscaler: NPUs, CPUs for engine cores, Ray's strategy for them."""

    npus: int
    cpus: int
    strategy: str

    def bundles(self, device_key: str = "NPU") -> list[dict[str, float]]:
        """Return the bundles: on any nodes."""
        return [{device_key: 1.0}] * self.npus + [{"CPU": 1.0}] * self.cpus


class _Attempt(NamedTuple):
    """The ranks that fit, and why they are fewer than requested; no ``reason`` where all fit."""

    ranks: list[RankPlacement]
    reason: str = ""


def plan_placement(request: DpRequest, nodes: Sequence[NodeNpus]) -> list[RankPlacement]:
    """Place every rank, as vLLM's CoreEngineActorManager.create_dp_placement_groups would: master first, then in order.

    Raises PlacementError; it names the option that makes the request fit, or how much of it fits.
    """
    task = _describe_request(request)
    _validate_nodes(task, nodes, request.master, request.allowed_addresses, request.kind, request.master_address)
    if request.strategy not in STRATEGIES:
        reason = f"{PACK_VARIABLE} accepts only {', '.join(STRATEGIES)}"
        remedy = f"Unset it, or: {PACK_VARIABLE}=strict"
        raise PlacementError("VRA-228", _placement_message(task, nodes, request.kind, reason, remedy))
    attempt = _try_placement(request, nodes)
    if attempt.reason:
        remedy = _suggest_remedy(request, nodes)
        raise ShortageError("VRA-229", _placement_message(task, nodes, request.kind, attempt.reason, remedy))
    return attempt.ranks


def fit_local_size(request: DpRequest, nodes: Sequence[NodeNpus]) -> int:
    """Return how many ranks the master takes where the user has not said: as many as it has room for.

    Fewer where the other nodes, which with "strict" take as many as the master, then fit all ranks. What is not free
    now but declared counts where nothing fits otherwise: it may be released, or nodes may join, before ranks are
    placed.
    """
    if request.strategy == "span":
        return 1
    if not any(_is_at(node, request.master) for node in nodes):
        return request.dp_size
    declared = [replace(node, free=0 if node.note else node.total) for node in nodes]
    for each in (nodes, declared):
        (master, *_) = _usable_nodes(each, request.master, request.allowed_addresses)
        if _serves_other_nodes_only(request, master):
            return 0
        for size in _candidate_local_sizes(replace(request, dp_size_local=request.dp_size), master, even_first=False):
            if not _try_placement(replace(request, dp_size_local=size), each).reason:
                return size
    most = max(node.free for node in (*nodes, *declared) if _is_at(node, request.master)) // request.world_size
    return max(1, min(request.dp_size, most))


def growth_demand(request: DpRequest, nodes: Sequence[NodeNpus]) -> list[RankPlacementDemand]:
    """Return what an autoscaler is asked for so that the ranks fit; nothing where further nodes would not help.

    What the nodes have already is part of it: Ray grants that immediately. With "strict" a node takes as many ranks as
    the master, with "fill" one at least, with "span" a part of one.
    """
    whole, local = request.world_size, max(1, request.dp_size_local)
    is_strict = request.strategy == "strict" and request.dp_size_local > 0
    largest = max((node.free for node in nodes), default=0)
    new_free = largest if request.strategy == "span" else local * whole
    count = -(-request.dp_size * whole // new_free) if new_free else 0
    grown = [*nodes, *(NodeNpus(f"new node {number}", new_free, new_free) for number in range(count))]
    if request.allowed_addresses or _try_placement(request, grown).reason:
        return []
    if request.strategy == "span":
        return [RankPlacementDemand(whole, 1, "PACK")] * request.dp_size
    others = [local] * -(-(request.dp_size - local) // local) if is_strict else [1] * (request.dp_size - local)
    return [RankPlacementDemand(whole * ranks, ranks, "STRICT_PACK") for ranks in (local, *others)]


def plan_scale_up(
    current: Sequence[PlacedRank],
    new_dp_size: int,
    world_size: int,
    master: str,
    nodes: Sequence[NodeNpus],
    allowed_addresses: Collection[str] = frozenset(),
    kind: Kind = NPU,
) -> list[RankPlacement]:
    """Place the ranks that scaling to ``new_dp_size`` adds, the master's node first, each whole on one node.

    A rank's local number is the smallest that this engine does not use on that very node. vLLM derives it from the
    NPUs in use there, by whatever engine, and pins only the master's ranks to the node it was derived for.
    Raises PlacementError.
    """
    new_ranks = range(len(current), new_dp_size)
    task = f"Cannot scale from {len(current)} to {new_dp_size} data parallel ranks of {kind.format_count(world_size)}"
    _validate_nodes(task, nodes, master, allowed_addresses, kind)
    places = _free_places(current, world_size, _usable_nodes(nodes, master, allowed_addresses))
    if len(places) < len(new_ranks):
        fitting = len(current) + len(places)
        more = _free_more_npus((len(new_ranks) - len(places)) * world_size, kind)
        remedy = f'{more}, or scale to: {{"new_data_parallel_size": {fitting}}}' if places else more
        reason = f"The nodes fit {_format_ranks(len(places))} more"
        raise ShortageError("VRA-230", _placement_message(task, nodes, kind, reason, remedy))
    return [
        _place_rank(dp_rank, local_dp_rank, [node] * world_size)
        for dp_rank, (node, local_dp_rank) in zip(new_ranks, places, strict=False)
    ]


def plan_replacement(
    dp_rank: int,
    others: Sequence[PlacedRank],
    world_size: int,
    master: str,
    nodes: Sequence[NodeNpus],
    allowed_addresses: Collection[str] = frozenset(),
    kind: Kind = NPU,
    group_size: int = 1,
) -> RankPlacement:
    """Place a rank again a node of which is lost or drains, beside the ``others``.

    Whole on one node, the master's first; one that is larger than any node across several, groups of ``group_size``
    workers whole where possible. Nodes of ``allowed_addresses`` that are gone do not matter. Raises PlacementError.
    """
    task = f"Cannot place data parallel rank {dp_rank} of {kind.format_count(world_size)} on other nodes"
    allowed = frozenset(allowed_addresses) & {node.address for node in nodes} if allowed_addresses else frozenset()
    _validate_nodes(task, nodes, master, allowed, kind)
    usable = [node for node in nodes if not allowed_addresses or node.address in allowed or _is_at(node, master)]
    placed = [node for node, _ in _free_places(others, world_size, usable)[:1] for _ in range(world_size)]
    if not placed and world_size > max((node.total for node in usable), default=0):
        by_key = {node.key: node for node in usable}
        free = {node.key: node.free for node in usable}
        placed = [by_key[key] for key in place_groups(free, group_size, world_size // group_size)]
    if not placed:
        more = _free_more_npus(world_size, kind)
        raise ShortageError("VRA-154", _placement_message(task, nodes, kind, "No node has room for it", more))
    local_dp_rank = next(_unused_local_ranks(others, placed[0]))
    return _place_rank(dp_rank, min(local_dp_rank, dp_rank), placed)  # vLLM refuses a greater one


def is_tied_by_mp_backend(
    dp_rank: int, world_size: int, rendezvous_address: str, address: str, free: int, kind: Kind = NPU
) -> bool:
    """Return whether an MoE engine with --data-parallel-backend mp has to be on the node of its process.

    The workers of all ranks connect to --data-parallel-address (``rendezvous_address``), where the first worker of rank
    0 listens: at a loopback address, vLLM's default, all of them have to be on the node of the process (``address``),
    of whose NPUs ``free`` are free; at another one, those of rank 0. Dense ranks never connect to each other; for them
    vLLM has reset the size. Raises ShortageError where they do not fit there.
    """
    if dp_rank > 0 and not is_loopback(rendezvous_address):
        return False
    if free < world_size:
        raise ShortageError(
            "VRA-231",
            f"Data parallel rank {dp_rank} of this MoE model needs {kind.format_count(world_size)} on this node "
            f"({address}), where {free} are free: with --data-parallel-backend mp the ranks connect at "
            f"{rendezvous_address}. Add --data-parallel-backend ray: the ranks that do not fit here then are on other "
            "nodes.",
        )
    return True


def _free_places(
    current: Sequence[PlacedRank], world_size: int, nodes: Sequence[NodeNpus]
) -> list[tuple[NodeNpus, int]]:
    """Return the places for further whole ranks, as node and local rank there, in the order of ``nodes``."""
    places: list[tuple[NodeNpus, int]] = []
    for node in nodes:
        unused = _unused_local_ranks(current, node)
        places += [(node, next(unused)) for _ in range(node.free // world_size)]
    return places


def _unused_local_ranks(current: Sequence[PlacedRank], node: NodeNpus) -> Iterator[int]:
    """Return the local ranks that no rank has on a node, in ascending order, without end."""
    taken = {(rank.node, rank.local_dp_rank) for rank in current}
    return (number for number in count() if not {(node.key, number), (node.address, number)} & taken)


def _try_placement(request: DpRequest, nodes: Sequence[NodeNpus]) -> _Attempt:
    usable = _usable_nodes(nodes, request.master, request.allowed_addresses)
    place = _place_across_nodes if request.strategy == "span" else _place_within_nodes
    attempt = place(request, usable)
    if not attempt.reason and len(attempt.ranks) < request.dp_size:
        return attempt._replace(reason=f"So the nodes fit {_format_ranks(len(attempt.ranks))}")
    return attempt


def _place_within_nodes(request: DpRequest, nodes: Sequence[NodeNpus]) -> _Attempt:
    """Place ranks that each fit one node, for "strict" and "fill". The master is the first of ``nodes``."""
    strict = request.strategy == "strict" and request.dp_size_local > 0  # else no number is given for a node
    if request.strategy != "strict" and request.all2all_backend in _DEEPEP:
        needs = "needs EP ranks 0 to 7, 8 to 15, ... on one node each"
        return _Attempt([], f"{request.all2all_backend} {needs}, which fill does not guarantee")
    local_size, master = request.dp_size_local, nodes[0]
    if request.ranks_meet and not local_size:
        return _Attempt([], "Ranks of this model connect to each other at the master, where rank 0 has to be")
    if master.free < local_size * request.world_size:
        return _Attempt([], f"The master fits {_format_ranks(master.free // request.world_size)}")
    places: list[tuple[NodeNpus, int]] = []
    for node in nodes:
        fitting = node.free // request.world_size
        takes_local_size = node is master or (strict and fitting >= local_size)
        ranks_here = local_size if takes_local_size else 0 if strict else fitting
        places += [(node, local_dp_rank) for local_dp_rank in range(ranks_here)]
    return _Attempt(
        [
            _place_rank(dp_rank, local_dp_rank, [node] * request.world_size)
            for dp_rank, (node, local_dp_rank) in enumerate(places[: request.dp_size])
        ]
    )


def _place_rank(dp_rank: int, local_dp_rank: int, nodes: Sequence[NodeNpus]) -> RankPlacement:
    """Return the placement of a rank on ``nodes``, one for each of its workers."""
    node_ids = tuple(node.node_id for node in nodes) if all(node.node_id for node in nodes) else ()
    return RankPlacement(dp_rank, local_dp_rank, tuple(node.address for node in nodes), node_ids)


def _place_across_nodes(request: DpRequest, nodes: Sequence[NodeNpus]) -> _Attempt:
    """Place ranks larger than a node, for "span".

    As vLLM, each on whole nodes with equally many free NPUs; where that is not possible, or tensor parallel groups
    straddle nodes without need, on any nodes that are free.
    """
    used = [node for node in nodes if node.free]
    largest = max((node.free for node in used), default=0)
    if request.world_size <= largest:
        fitting = request.kind.format_count(request.world_size)
        reason = f"span is for ranks larger than a node, {fitting} fit one: use strict or fill"
    elif not nodes[0].free:
        reason = f"The master has no free {request.kind.key}"
    elif request.dp_size_local != 1:
        reason = "span counts one local rank only"
    else:
        plans = [_place_on_equal_nodes(request, used, largest), _place_on_any_nodes(request, used)]
        return _Attempt(min(plans, key=lambda plan: (-len(plan), _count_straddling(plan, request.group_size))))
    return _Attempt([], reason)


def _place_on_equal_nodes(request: DpRequest, used: Sequence[NodeNpus], largest: int) -> list[RankPlacement]:
    """Return vLLM's plan: each rank on whole nodes. Empty where the nodes do not have equally many free NPUs."""
    if any(node.free != largest for node in used) or request.world_size % largest:
        return []
    nodes_per_rank = request.world_size // largest
    first_nodes = range(0, len(used) - nodes_per_rank + 1, nodes_per_rank)
    groups = [used[first : first + nodes_per_rank] for first in first_nodes]
    return [
        _place_rank(dp_rank, 0, [node for node in group for _ in range(largest)])
        for dp_rank, group in enumerate(groups[: request.dp_size])
    ]


def _place_on_any_nodes(request: DpRequest, used: Sequence[NodeNpus]) -> list[RankPlacement]:
    """Return a plan with as many whole tensor parallel groups as possible, whose first rank begins on the master.

    Fewer ranks where not all fit; none where none of them begins there: rank 0 listens at the master's address.
    """
    master, size = used[0].key, request.world_size
    by_key = {node.key: node for node in used}
    free = {node.key: node.free for node in used}
    fitting = min(request.dp_size, sum(free.values()) // size)
    placed = place_groups(free, request.group_size, fitting * size // request.group_size, master)
    ranks = [tuple(placed[first : first + size]) for first in range(0, len(placed), size)]
    ranks.sort(key=lambda keys: keys[0] != master)
    if not ranks or ranks[0][0] != master:
        return []
    controls = [keys[0] for keys in ranks]
    return [
        _place_rank(dp_rank, controls[:dp_rank].count(controls[dp_rank]), [by_key[key] for key in keys])
        for dp_rank, keys in enumerate(ranks)
    ]


def _count_straddling(ranks: Sequence[RankPlacement], group_size: int) -> int:
    return sum(len(straddling_groups(rank.bundle_nodes, group_size)) for rank in ranks)


def _suggest_remedy(request: DpRequest, nodes: Sequence[NodeNpus]) -> str:
    """Return the nearest request that fits whole, or else the one of which most fits."""
    best, best_count = request, 0
    for other in _alternative_requests(request, nodes):
        placed = len(_try_placement(other, nodes).ranks)
        if placed == request.dp_size:
            return f"The request fits with: {_changed_settings(request, other)}"
        if placed > best_count:
            best, best_count = other, placed
    if best_count:
        more = _free_more_npus((request.dp_size - best_count) * request.world_size, request.kind)
        return f"{more}, or: {_changed_settings(request, replace(best, dp_size=best_count))}"
    missing = request.dp_size * request.world_size - sum(node.free for node in nodes)
    more = _free_more_npus(missing, request.kind)
    return f"{more}, or change the {request.kind.key}s of a rank: --tensor-parallel-size, --pipeline-parallel-size"


def _alternative_requests(request: DpRequest, nodes: Sequence[NodeNpus]) -> Iterator[DpRequest]:
    """Yield requests that differ from ``request`` in what a user can set, the smaller changes first."""
    every_node = frozenset(node.address for node in nodes if request.allowed_addresses)
    for allowed in dict.fromkeys((request.allowed_addresses, every_node)):
        usable = _usable_nodes(nodes, request.master, allowed)
        is_usable = usable[0].free >= request.world_size or _serves_other_nodes_only(request, usable[0])
        masters = usable[:1] if is_usable else usable
        for master in masters:
            for strategy in dict.fromkeys((request.strategy, *STRATEGIES)):
                other = replace(
                    request,
                    strategy=strategy,
                    master_address=master.address,
                    master_id=master.node_id,
                    allowed_addresses=allowed,
                )
                if strategy == "span":
                    alike = frozenset(node.address for node in usable if node.free == master.free)
                    yield replace(other, dp_size_local=1)
                    yield replace(other, dp_size_local=1, allowed_addresses=alike)
                else:
                    yield from (replace(other, dp_size_local=size) for size in _candidate_local_sizes(request, master))


def _serves_other_nodes_only(request: DpRequest, master: NodeNpus) -> bool:
    """Return whether the master, such as a head without NPUs, takes no rank and none needs it."""
    return not master.total and not request.ranks_meet and request.strategy != "span"


def _candidate_local_sizes(request: DpRequest, master: NodeNpus, even_first: bool = True) -> list[int]:
    """Return the values of --data-parallel-size-local that fit the master: the given, even shares, large ones first."""
    if _serves_other_nodes_only(request, master):
        return [0]
    most = min(request.dp_size, master.free // request.world_size)
    given = request.dp_size_local
    return sorted(
        range(1, most + 1), key=lambda size: (size != given, even_first and request.dp_size % size != 0, -size)
    )


def _changed_settings(request: DpRequest, other: DpRequest) -> str:
    """Return the settings that turn ``request`` into ``other``."""
    settings = {
        f"`vllm serve` run on {other.master_address}": request.master not in (other.master_id, other.master_address),
        f"{PACK_VARIABLE}={other.strategy}": other.strategy != request.strategy,
        _node_ips_setting(other): other.allowed_addresses != request.allowed_addresses,
        f"--data-parallel-size {other.dp_size}": other.dp_size != request.dp_size,
        f"--data-parallel-size-local {other.dp_size_local}": other.dp_size_local != request.dp_size_local,
    }
    return ", ".join(setting for setting, differs in settings.items() if differs)


def _is_at(node: NodeNpus, key: str) -> bool:
    return key in (node.node_id, node.address)


def _usable_nodes(nodes: Sequence[NodeNpus], master: str, allowed: Collection[str]) -> list[NodeNpus]:
    """Return the nodes that may be used, the master first, else in the given order."""
    usable = [node for node in nodes if not allowed or node.address in allowed or _is_at(node, master)]
    return sorted(usable, key=lambda node: not _is_at(node, master))


def _validate_nodes(
    task: str,
    nodes: Sequence[NodeNpus],
    master: str,
    allowed: Collection[str],
    kind: Kind,
    master_address: str = "",
) -> None:
    """Raise PlacementError where the master or an allowed node is missing, or there is nothing to place on."""
    addresses = [node.address for node in nodes]
    listed = ",".join(addresses)
    if not nodes:
        reason, remedy = "The Ray cluster has no live node", "Start one: `ray start --head`"
        raise PlacementError("VRA-232", _placement_message(task, nodes, kind, reason, remedy))
    if not any(node.total for node in nodes):
        reason = f"No node declares {kind.with_article}"
        check = (
            "Load CANN's set_env.sh before `ray start`" if kind is NPU else f"Run `{kind.list_command}` on the nodes"
        )
        remedy = f"{check}, or declare them: `ray start ... {kind.ray_start_option(8)}`"
        raise PlacementError("VRA-234", _placement_message(task, nodes, kind, reason, remedy))
    if not any(_is_at(node, master) for node in nodes):
        reason = f"The master {master_address or master} is not a live node of the Ray cluster"
        remedy = f"Set --data-parallel-address or VLLM_HOST_IP to this node's address there, one of: {listed}"
        raise PlacementError("VRA-235", _placement_message(task, nodes, kind, reason, remedy))
    if unknown := [address for address in sorted(allowed) if address not in addresses]:
        reason = f"{NODES_VARIABLE} names {', '.join(unknown)}: not a live node of the Ray cluster"
        remedy = f"Choose among: {NODES_VARIABLE}={listed}"
        raise PlacementError("VRA-236", _placement_message(task, nodes, kind, reason, remedy))


def _placement_message(task: str, nodes: Sequence[NodeNpus], kind: Kind, reason: str, remedy: str) -> str:
    counts = [f"{node.address}: {node.free} of {node.total}{node.note and f' ({node.note})'}" for node in nodes]
    free = ", ".join(counts) or "none"
    return f"{task}. Free {kind.key}s: {free}. {reason}. {remedy}"


def _describe_request(request: DpRequest) -> str:
    allowed = f", {_node_ips_setting(request)}" if request.allowed_addresses else ""
    return (
        f"Cannot place {request.dp_size} data parallel ranks of {request.kind.format_count(request.world_size)}, "
        f"{request.dp_size_local} on the master {request.master_address} (--data-parallel-size {request.dp_size}, "
        f"--data-parallel-size-local {request.dp_size_local}, {PACK_VARIABLE}={request.strategy}{allowed})"
    )


def _node_ips_setting(request: DpRequest) -> str:
    return f"{NODES_VARIABLE}={','.join(sorted(request.allowed_addresses))}"


def _free_more_npus(missing: int, kind: Kind) -> str:
    stop = f"{kind.format_count(missing)} more must be free: stop" if missing > 0 else "Stop"
    return f"{stop} other engines, add nodes (`ray start --address=HEAD:PORT`)"


def _format_ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"
