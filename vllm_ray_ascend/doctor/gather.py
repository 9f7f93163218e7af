"""Take a snapshot: of every node of the joined Ray cluster at once, or of this one without Ray."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from vllm_ray_ascend import __version__
from vllm_ray_ascend.addresses import join_host_port
from vllm_ray_ascend.cluster.connect import this_driver
from vllm_ray_ascend.cluster.placement_groups import current_nodes
from vllm_ray_ascend.cluster.probe import Answer, run_on_nodes
from vllm_ray_ascend.cluster.registry import EngineRecord, running_engines
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.doctor.collect import (
    collect_as_dict,
    collect_record,
    decode_outputs,
    decode_record,
    ping_as_dict,
)
from vllm_ray_ascend.doctor.host_addresses import host_addresses, route_targets
from vllm_ray_ascend.doctor.queries import ENGINES, ROUTES, device_addresses, ping_lines
from vllm_ray_ascend.doctor.records import Failure, Level, NodeRecord, Output, RayNode, Snapshot
from vllm_ray_ascend.doctor.routes import decode_routes, routes_as_dict
from vllm_ray_ascend.errors import DoctorError

_MARGIN_S = 3.0
"""A node has so much less than the driver waits for it, so that a slow tool does not cost the whole record."""
_ROUTES_S = 10.0
"""For the routes, which no tool is asked for: a node that does not answer by then has none."""


def snapshot_of_this_node(level: Level, commands: Sequence[str], limit_s: float) -> Snapshot:
    """Return a snapshot of the node of this process, without Ray."""
    record = collect_record(os.uname().nodename, commands, (), limit_s)
    return Snapshot(version=__version__, time=time.time(), level=level, nodes=[record])


def snapshot_of_cluster(
    level: Level, commands: Sequence[str], limit_s: float, only: Collection[str] = (), *, with_pings: bool = False
) -> Snapshot:
    """Return a snapshot of all nodes of the joined cluster, or of those with the addresses or host names ``only``.

    ``with_pings``: then NPUs ping those of other nodes, which takes a few seconds more.
    """
    rows = _live_rows()
    everywhere = current_nodes()
    nodes = [node for node in everywhere if not only or _names(rows[node.node_id]) & set(only)]
    _require_all_found(only, [rows[node.node_id] for node in nodes], rows.values())
    snapshot = snapshot_of_nodes(nodes, list(rows), level, commands, limit_s, with_pings=with_pings)
    asked = {node.node_id for node in nodes}
    left_out = [node for node in everywhere if node.node_id not in asked]
    npus = sum(node.npus for node in left_out)
    return replace(snapshot, left_out=sorted(node.address for node in left_out), left_out_npus=npus)


def snapshot_of_nodes(
    nodes: Collection[NodeResources],
    peers: Collection[str],
    level: Level,
    commands: Sequence[str],
    limit_s: float,
    *,
    with_pings: bool = False,
) -> Snapshot:
    """Return a snapshot of these nodes of the joined cluster; each connects to the nodes with the ids ``peers``."""
    import ray

    rows, by_id = _live_rows(), {node.node_id: node for node in nodes}
    raylets = {node_id: _raylet(row) for node_id, row in rows.items()}
    known_peers = {node_id: raylets[node_id] for node_id in peers if node_id in raylets}
    arguments = {
        node_id: (node.address, commands, _others(known_peers, node_id), max(1.0, limit_s - _MARGIN_S))
        for node_id, node in by_id.items()
    }
    engines = _engines() if ENGINES in commands else None
    found = run_on_nodes(collect_as_dict, decode_record, arguments, limit_s)
    records = {
        node_id: replace(answer.value, ray=_ray_node(by_id[node_id], raylets.get(node_id, ""), answer, engines))
        for node_id, answer in sorted(found.answers.items(), key=lambda entry: by_id[entry[0]].address)
    }
    if ROUTES in commands:
        records = _with_routes(records, min(limit_s, _ROUTES_S))
    if with_pings:
        records = _with_pings(records, limit_s)
    failures = [Failure(by_id[node_id].address, by_id[node_id].npus, why) for node_id, why in found.failures.items()]
    driver = this_driver()
    return Snapshot(
        version=__version__,
        time=time.time(),
        level=level,
        head_address=ray.get_runtime_context().gcs_address,
        versions=dict(driver.versions),
        switches=sorted(driver.switches),
        nodes=list(records.values()),
        failures=failures,
    )


def _live_rows() -> dict[str, Mapping[str, Any]]:
    import ray

    return {str(row["NodeID"]): row for row in ray.nodes() if row["Alive"]}


def _engines() -> list[EngineRecord] | None:
    """Return the engines that run; None where Ray does not say."""
    try:
        return running_engines()
    except Exception:  # noqa: BLE001  of another Ray, or a control store that does not answer: unknown
        return None


def _with_routes(records: Mapping[str, NodeRecord], limit_s: float) -> dict[str, NodeRecord]:
    """Return the records with each node's routes to the addresses that the others use."""
    targets = dict(zip(records, route_targets(list(records.values())), strict=True))
    own = {
        node_id: sorted({chosen.address for chosen in host_addresses(record).values() if chosen.interface})
        for node_id, record in records.items()
    }
    arguments = {node_id: (each, own[node_id]) for node_id, each in targets.items() if each}
    found = run_on_nodes(routes_as_dict, decode_routes, arguments, limit_s)
    routes = {node_id: answer.value for node_id, answer in found.answers.items()}
    return {
        node_id: replace(record, routes=routes.get(node_id, {}), routes_error=found.failures.get(node_id, ""))
        for node_id, record in records.items()
    }


def _with_pings(records: Mapping[str, NodeRecord], limit_s: float) -> dict[str, NodeRecord]:
    """Return the records with what NPUs say who have pinged those of the next node."""
    lines = dict(zip(records, ping_lines([device_addresses(record) for record in records.values()]), strict=True))
    arguments = {node_id: (each, max(1.0, limit_s - _MARGIN_S)) for node_id, each in lines.items() if each}
    found = run_on_nodes(ping_as_dict, decode_outputs, arguments, limit_s)
    late = {node_id: dict.fromkeys(lines[node_id], Output(None, why)) for node_id, why in found.failures.items()}
    outputs = late | {node_id: answer.value for node_id, answer in found.answers.items()}
    return {
        node_id: replace(record, outputs={**record.outputs, **outputs.get(node_id, {})})
        for node_id, record in records.items()
    }


def _names(row: Mapping[str, Any]) -> set[str]:
    return {str(row["NodeManagerAddress"]), str(row["NodeManagerHostname"])}


def _require_all_found(
    only: Collection[str], rows: Collection[Mapping[str, Any]], live: Collection[Mapping[str, Any]]
) -> None:
    known = {name for row in rows for name in _names(row)}
    if missing := [name for name in only if name not in known]:
        nodes = sorted(f"{row['NodeManagerAddress']} ({row['NodeManagerHostname']})" for row in live)
        raise DoctorError(
            "VRA-604", f"No live node of the Ray cluster is {', '.join(missing)}. The nodes: {', '.join(nodes)}."
        )


def _raylet(row: Mapping[str, Any]) -> str:
    return join_host_port(str(row["NodeManagerAddress"]), int(row["NodeManagerPort"]))


def _others(raylets: Mapping[str, str], node_id: str) -> list[str]:
    return [raylet for other, raylet in raylets.items() if other != node_id]


def _ray_node(node: NodeResources, raylet: str, answer: Answer, engines: Sequence[EngineRecord] | None) -> RayNode:
    return RayNode(
        node_id=node.node_id,
        raylet=raylet,
        npus=node.npus,
        gpus=node.gpus,
        free_npus=node.free,
        sent=answer.sent,
        received=answer.received,
        shared_physical_ids=None if engines is None else _shared_physical_ids(node, engines),
    )


def _shared_physical_ids(node: NodeResources, engines: Sequence[EngineRecord]) -> list[int]:
    """Return the physical ids of a node's NPUs of which several ranks have parts."""
    sharing = [engine for engine in engines if engine.device_key == NPU.key and engine.share < 1]
    ranks = (rank for engine in sharing for rank in engine.ranks if rank.is_on(node.node_id, node.address))
    counts = Counter(rank.physical_id for rank in ranks)
    return sorted(physical_id for physical_id, count in counts.items() if count > 1)
