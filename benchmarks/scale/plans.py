"""The pure parts of a start with many ranks, on nodes of eight NPUs: placement, records, audit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_ray_ascend.cluster.audit import Driver, audit_node, raise_for_findings
from vllm_ray_ascend.cluster.dp_placement import DpRequest, NodeNpus, plan_placement
from vllm_ray_ascend.cluster.node_facts import NodeFacts
from vllm_ray_ascend.cluster.rank_placement import order_bundles, place_groups, straddling_groups
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims_of_engine, is_alive
from vllm_ray_ascend.devices.owners import check_claims

NPUS_PER_NODE = 8
_REPEATS = 3


def measure_plans(ranks: int) -> dict[str, float]:
    """Return the seconds of each part, the best of three."""
    group = min(ranks, NPUS_PER_NODE)
    nodes = [_address(number) for number in range(-(-ranks // NPUS_PER_NODE))]
    free = dict.fromkeys(nodes, NPUS_PER_NODE)
    bundles = {index: nodes[index * 7919 % ranks // NPUS_PER_NODE] for index in range(ranks)}
    record = _record(ranks)
    return {
        "place_dp": _seconds(lambda: _place_dp(ranks, group, nodes)),
        "place_dp_of_one": _seconds(lambda: _place_dp(ranks, 1, nodes)),
        "place_groups": _seconds(lambda: straddling_groups(place_groups(free, group, ranks // group, nodes[0]), group)),
        "order_bundles": _seconds(lambda: order_bundles(bundles, group, ranks // group, nodes[0])),
        "registry": _seconds(lambda: _register(record)),
        "audit": _seconds(lambda: _audit(nodes)),
    }


def _place_dp(ranks: int, group: int, nodes: list[str]) -> None:
    """Plan data parallel ranks of one tensor parallel group each, as many on each node as fit."""
    dp_size = ranks // group
    local = min(dp_size, NPUS_PER_NODE // group)
    request = DpRequest(dp_size, local, group, nodes[0], strategy="fill", group_size=group)
    assert len(plan_placement(request, [NodeNpus(node, NPUS_PER_NODE, NPUS_PER_NODE) for node in nodes])) == dp_size


def _register(record: EngineRecord) -> None:
    """Do what a start does with the records of two engines: write, read, see that both live and share no NPU."""
    other = msgspec.json.decode(msgspec.json.encode(record), type=EngineRecord)
    assert is_alive(other, {rank.actor_name for rank in record.ranks})
    check_claims([claim for each in (record, other) for claim in claims_of_engine(each)])


def _audit(nodes: list[str]) -> None:
    findings = [
        finding
        for node in nodes
        for finding in audit_node(
            NodeFacts(node, node, cann_devices=8, device_files=tuple(range(8)), npu_smi=8, acl_importable=True),
            8.0,
            0.0,
            f"{nodes[0]}:6379",
            Driver(),
        )
    ]
    assert raise_for_findings(findings) == []


def _record(ranks: int) -> EngineRecord:
    return EngineRecord(
        engine="engine",
        dp_rank=0,
        model="model",
        address=_address(0),
        pid=1,
        group="0" * 36,
        share=1.0,
        started=time.time(),
        ranks=tuple(
            RankRecord(
                rank=rank,
                local_rank=rank % NPUS_PER_NODE,
                address=_address(rank // NPUS_PER_NODE),
                visible_index=rank % NPUS_PER_NODE,
                physical_id=rank % NPUS_PER_NODE,
                bundle_index=rank,
                pid=1000 + rank,
                actor_name=f"vllm_Worker_engine_{rank}",
            )
            for rank in range(ranks)
        ),
    )


def _address(node: int) -> str:
    return f"10.{node // 65536}.{node // 256 % 256}.{node % 256}"


def _seconds(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
