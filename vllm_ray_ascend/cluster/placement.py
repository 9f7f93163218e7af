"""Which node each data parallel rank goes to: a plan made before anything is placed. Pure, over what the nodes have."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import PlacementError, ShortageError

PACK_VARIABLE = "VLLM_RAY_DP_PACK_STRATEGY"
NODES_VARIABLE = "VLLM_RAY_DP_PLACEMENT_NODE_IPS"
STRATEGIES = ("strict", "fill", "span")
_DEEPEP = ("deepep_high_throughput", "deepep_low_latency")
_AFFINITY = 0.001
"""So much of a node's "node:IP" resource pins a bundle to it, and lets a thousand be pinned."""


@dataclass(frozen=True)
class NodeNpus:
    """A live Ray node's whole accelerators of one kind: free now, and in all."""

    address: str
    free: int
    total: int


@dataclass(frozen=True)
class DpRequest:
    """What the options ask for: ``dp_size`` ranks of ``world_size`` NPUs, ``dp_size_local`` of them on the master."""

    dp_size: int
    dp_size_local: int
    world_size: int
    master_address: str
    strategy: str = "strict"
    allowed_addresses: frozenset[str] = frozenset()
    """Nodes that may be used besides the master; empty: all."""
    all2all_backend: str = ""
    kind: Kind = NPU


@dataclass(frozen=True)
class RankPlacement:
    """Where one data parallel rank goes: the node of each of its NPU bundles, in the order of its workers' ranks."""

    dp_rank: int
    local_dp_rank: int
    bundle_addresses: tuple[str, ...]

    @property
    def control_address(self) -> str:
        """Node of the engine actor: that of the first worker, which the others meet at."""
        return self.bundle_addresses[0]

    @property
    def strategy(self) -> str:
        """Ray's strategy for the placement group."""
        return "STRICT_PACK" if len(set(self.bundle_addresses)) == 1 else "PACK"

    def bundles(self, device_key: str = "NPU") -> list[dict[str, float]]:
        """Bundles as vLLM addresses them: by rank its workers', then, at index ``world_size``, the engine actor's."""
        workers = [{device_key: 1.0, f"node:{address}": _AFFINITY} for address in self.bundle_addresses]
        return [*workers, {"CPU": 1.0, f"node:{self.control_address}": _AFFINITY}]


class Placed(NamedTuple):
    """A data parallel rank that runs already, and the node of its engine actor."""

    dp_rank: int
    local_dp_rank: int
    address: str


class _Attempt(NamedTuple):
    """The ranks that fit, and why these are not all; no ``reason`` where they are."""

    ranks: list[RankPlacement]
    reason: str = ""


def plan(request: DpRequest, nodes: Sequence[NodeNpus]) -> list[RankPlacement]:
    """Place every rank, as vLLM's CoreEngineActorManager.create_dp_placement_groups would: master first, then in order.

    Raises PlacementError; it names the option that makes the request fit, or how much of it fits.
    """
    asked = _asked(request)
    _check_nodes(asked, nodes, request.master_address, request.allowed_addresses, request.kind)
    if request.strategy not in STRATEGIES:
        reason = f"{PACK_VARIABLE} knows {', '.join(STRATEGIES)} only"
        raise _refusal(asked, nodes, request.kind, reason, f"Unset it, or: {PACK_VARIABLE}=strict")
    attempt = _attempt(request, nodes)
    if attempt.reason:
        raise ShortageError(_refusal_text(asked, nodes, request.kind, attempt.reason, _remedy(request, nodes)))
    return attempt.ranks


def plan_scale_up(
    current: Sequence[Placed],
    new_dp_size: int,
    world_size: int,
    master_address: str,
    nodes: Sequence[NodeNpus],
    allowed_addresses: Collection[str] = frozenset(),
    kind: Kind = NPU,
) -> list[RankPlacement]:
    """Place the ranks that scaling to ``new_dp_size`` adds, the master's node first, each whole on one node.

    A rank's local number is the smallest that this engine does not use on that very node. vLLM derives it from the
    NPUs in use there, by whatever engine, and pins only the master's ranks to the node it was derived for.
    Raises PlacementError.
    """
    new = range(len(current), new_dp_size)
    asked = f"Cannot scale from {len(current)} to {new_dp_size} data parallel ranks of {kind.counted(world_size)}"
    _check_nodes(asked, nodes, master_address, allowed_addresses, kind)
    taken = {(rank.address, rank.local_dp_rank) for rank in current}
    places: list[tuple[str, int]] = []
    for node in _hosts(nodes, master_address, allowed_addresses):
        unused = (number for number in count() if (node.address, number) not in taken)
        places += [(node.address, next(unused)) for _ in range(node.free // world_size)]
    if len(places) < len(new):
        fits = len(current) + len(places)
        more = _shortage((len(new) - len(places)) * world_size, kind)
        remedy = f'{more}, or scale to: {{"new_data_parallel_size": {fits}}}' if places else more
        raise ShortageError(_refusal_text(asked, nodes, kind, f"The nodes fit {_ranks(len(places))} more", remedy))
    return [
        RankPlacement(rank, local, (address,) * world_size) for rank, (address, local) in zip(new, places, strict=False)
    ]


def node_of_process(
    dp_rank: int, world_size: int, meeting: str, address: str, free: int, kind: Kind = NPU
) -> dict[str, float]:
    """What a bundle of an MoE engine asks for besides its NPU with --data-parallel-backend mp: its node, or nothing.

    The workers of all ranks meet at --data-parallel-address (``meeting``), where the first worker of rank 0 listens: at
    a loopback address, vLLM's default, all of them have to be on the node of the process (``address``), of whose NPUs
    ``free`` are free; at another one, those of rank 0. Dense ranks never meet; for them vLLM has reset the size.
    Raises ShortageError where they do not fit there.
    """
    if dp_rank > 0 and not ipaddress.ip_address(meeting).is_loopback:
        return {}
    if free < world_size:
        raise ShortageError(
            f"Data parallel rank {dp_rank} of this MoE model needs {kind.counted(world_size)} on this node "
            f"({address}), where {free} are free: with --data-parallel-backend mp the ranks meet at {meeting}. Add "
            "--data-parallel-backend ray --data-parallel-size-local N, with N ranks on this node; the others may then "
            "be on other nodes."
        )
    return {f"node:{address}": 0.001}


def _attempt(request: DpRequest, nodes: Sequence[NodeNpus]) -> _Attempt:
    hosts = _hosts(nodes, request.master_address, request.allowed_addresses)
    attempt = _span(request, hosts) if request.strategy == "span" else _pack(request, hosts)
    if not attempt.reason and len(attempt.ranks) < request.dp_size:
        return attempt._replace(reason=f"So the nodes fit {_ranks(len(attempt.ranks))}")
    return attempt


def _pack(request: DpRequest, hosts: Sequence[NodeNpus]) -> _Attempt:
    """Ranks that each fit one node, for "strict" and "fill"."""
    strict = request.strategy == "strict"
    if not strict and request.all2all_backend in _DEEPEP:
        needs = "needs EP ranks 0 to 7, 8 to 15, ... on one node each"
        return _Attempt([], f"{request.all2all_backend} {needs}, fill does not keep to that")
    local, master = request.dp_size_local, hosts[0]
    if master.free < local * request.world_size:
        return _Attempt([], f"The master fits {_ranks(master.free // request.world_size)}")
    places: list[tuple[str, int]] = []
    for node in hosts:
        fit = node.free // request.world_size
        share = local if node is master or (strict and fit >= local) else 0 if strict else fit
        places += [(node.address, number) for number in range(share)]
    return _Attempt(
        [
            RankPlacement(rank, number, (address,) * request.world_size)
            for rank, (address, number) in enumerate(places[: request.dp_size])
        ]
    )


def _span(request: DpRequest, hosts: Sequence[NodeNpus]) -> _Attempt:
    """Ranks larger than a node, each of whole nodes that are alike."""
    used = [node for node in hosts if node.free]
    largest = max((node.free for node in used), default=0)
    if request.world_size <= largest:
        fitting = request.kind.counted(request.world_size)
        reason = f"span is for ranks larger than a node, {fitting} fit one: use strict or fill"
    elif not hosts[0].free:
        reason = f"The master has no free {request.kind.key}"
    elif any(node.free != largest for node in used):
        reason = f"span needs equally many free {request.kind.key}s on every node"
    elif request.world_size % largest:
        reason = f"span takes whole nodes, and {request.world_size} is no multiple of {largest}"
    elif request.dp_size_local != 1:
        reason = "span counts one local rank only"
    else:
        each = request.world_size // largest
        groups = [used[first : first + each] for first in range(0, len(used) - each + 1, each)]
        return _Attempt(
            [
                RankPlacement(rank, 0, tuple(node.address for node in group for _ in range(largest)))
                for rank, group in enumerate(groups[: request.dp_size])
            ]
        )
    return _Attempt([], reason)


def _remedy(request: DpRequest, nodes: Sequence[NodeNpus]) -> str:
    """The nearest request that fits whole, or else the one of which most fits."""
    best, fits = request, 0
    for other in _alternatives(request, nodes):
        placed = len(_attempt(other, nodes).ranks)
        if placed == request.dp_size:
            return f"The request fits with: {_difference(request, other)}"
        if placed > fits:
            best, fits = other, placed
    if fits:
        more = _shortage((request.dp_size - fits) * request.world_size, request.kind)
        return f"{more}, or: {_difference(request, replace(best, dp_size=fits))}"
    more = _shortage(request.dp_size * request.world_size - sum(node.free for node in nodes), request.kind)
    return f"{more}, or change the {request.kind.key}s of a rank: --tensor-parallel-size, --pipeline-parallel-size"


def _alternatives(request: DpRequest, nodes: Sequence[NodeNpus]) -> Iterator[DpRequest]:
    """Requests that differ from ``request`` in what a user can set, the smaller changes first."""
    everywhere = frozenset(node.address for node in nodes if request.allowed_addresses)
    for allowed in dict.fromkeys((request.allowed_addresses, everywhere)):
        hosts = _hosts(nodes, request.master_address, allowed)
        masters = hosts[:1] if hosts[0].free >= request.world_size else hosts
        for master in masters:
            for strategy in dict.fromkeys((request.strategy, *STRATEGIES)):
                other = replace(request, strategy=strategy, master_address=master.address, allowed_addresses=allowed)
                if strategy == "span":
                    alike = frozenset(node.address for node in hosts if node.free == master.free)
                    yield replace(other, dp_size_local=1)
                    yield replace(other, dp_size_local=1, allowed_addresses=alike)
                else:
                    yield from (replace(other, dp_size_local=local) for local in _local_sizes(request, master))


def _local_sizes(request: DpRequest, master: NodeNpus) -> list[int]:
    """Values of --data-parallel-size-local for which the master has room: the given, even shares, large ones first."""
    most = min(request.dp_size, master.free // request.world_size)
    given = request.dp_size_local
    return sorted(range(1, most + 1), key=lambda local: (local != given, request.dp_size % local != 0, -local))


def _difference(asked: DpRequest, other: DpRequest) -> str:
    """The settings that turn ``asked`` into ``other``."""
    settings = {
        f"`vllm serve` run on {other.master_address}": other.master_address != asked.master_address,
        f"{PACK_VARIABLE}={other.strategy}": other.strategy != asked.strategy,
        _among(other): other.allowed_addresses != asked.allowed_addresses,
        f"--data-parallel-size {other.dp_size}": other.dp_size != asked.dp_size,
        f"--data-parallel-size-local {other.dp_size_local}": other.dp_size_local != asked.dp_size_local,
    }
    return ", ".join(setting for setting, differs in settings.items() if differs)


def _hosts(nodes: Sequence[NodeNpus], master: str, allowed: Collection[str]) -> list[NodeNpus]:
    """The nodes that may be used, the master first, else in the given order."""
    usable = [node for node in nodes if not allowed or node.address in allowed or node.address == master]
    return sorted(usable, key=lambda node: node.address != master)


def _check_nodes(asked: str, nodes: Sequence[NodeNpus], master: str, allowed: Collection[str], kind: Kind) -> None:
    """Raise PlacementError where the master or an allowed node is missing, or there is nothing to place on."""
    addresses = [node.address for node in nodes]
    listed = ",".join(addresses)
    if not nodes:
        raise _refusal(asked, nodes, kind, "The Ray cluster has no live node", "Start one: `ray start --head`")
    if len(set(addresses)) < len(addresses):
        reason = "An address has several Ray nodes, and ranks are pinned by address"
        raise _refusal(asked, nodes, kind, reason, "Keep one there: `ray stop`, then one `ray start`")
    if not any(node.total for node in nodes):
        first = (
            "Load CANN's set_env.sh before `ray start`" if kind is NPU else f"See `{kind.list_command}` on the nodes"
        )
        remedy = f"{first}, or declare them: `ray start ... {kind.ray_start(8)}`"
        raise _refusal(asked, nodes, kind, f"No node declares {kind.one}", remedy)
    if master not in addresses:
        remedy = f"Set --data-parallel-address or VLLM_HOST_IP to this node's address there, one of: {listed}"
        raise _refusal(asked, nodes, kind, f"The master {master} is no live node of the Ray cluster", remedy)
    if unknown := [address for address in sorted(allowed) if address not in addresses]:
        reason = f"{NODES_VARIABLE} names {', '.join(unknown)}: no live node of the Ray cluster"
        raise _refusal(asked, nodes, kind, reason, f"Choose among: {NODES_VARIABLE}={listed}")


def _refusal(asked: str, nodes: Sequence[NodeNpus], kind: Kind, reason: str, remedy: str) -> PlacementError:
    return PlacementError(_refusal_text(asked, nodes, kind, reason, remedy))


def _refusal_text(asked: str, nodes: Sequence[NodeNpus], kind: Kind, reason: str, remedy: str) -> str:
    have = ", ".join(f"{node.address}: {node.free} of {node.total}" for node in nodes) or "none"
    return f"{asked}. Free {kind.key}s: {have}. {reason}. {remedy}"


def _asked(request: DpRequest) -> str:
    among = f", {_among(request)}" if request.allowed_addresses else ""
    return (
        f"Cannot place {request.dp_size} data parallel ranks of {request.kind.counted(request.world_size)}, "
        f"{request.dp_size_local} on the master {request.master_address} (--data-parallel-size {request.dp_size}, "
        f"--data-parallel-size-local {request.dp_size_local}, {PACK_VARIABLE}={request.strategy}{among})"
    )


def _among(request: DpRequest) -> str:
    return f"{NODES_VARIABLE}={','.join(sorted(request.allowed_addresses))}"


def _shortage(npus: int, kind: Kind) -> str:
    missing = f"{kind.counted(npus)} more must be free: stop" if npus > 0 else "Stop"
    return f"{missing} other engines, add nodes (`ray start --address=HEAD:PORT`)"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"
