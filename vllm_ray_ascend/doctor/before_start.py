"""The checks of `doctor` that are made before each start of an engine too: the same code, and the same messages.

They start no tool but `npu-smi info -m`. An error of how NPUs are declared to Ray keeps the engine from starting.
Whatever else is found on the engine's nodes is a warning in the log: it may be meant, and vLLM's own executor would
start as well.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping

from msgspec.structs import replace

from vllm_ray_ascend.cluster.audit import raise_for_findings
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.placement_groups import current_nodes
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.gather import snapshot_of_nodes
from vllm_ray_ascend.doctor.judge import find
from vllm_ray_ascend.doctor.records import NodeRecord, Snapshot
from vllm_ray_ascend.log import get_logger

_LIMIT_S = 20.0
_REFUSING = [check for check in CHECKS.values() if check.at_start == "refuses"]
_WARNING = [check for check in CHECKS.values() if check.at_start == "warns"]

logger = get_logger(__name__)


def check_nodes(node_ids: Collection[str]) -> None:
    """Check the nodes of an engine, and log warnings. Raises ClusterResourceError with every error."""
    snapshot = _collect([node for node in current_nodes() if node.node_id in node_ids])
    _refuse(refusing_findings(snapshot, all_used=True))
    warn_of_nodes(snapshot, node_ids)


def check_cluster() -> Snapshot:
    """Check all nodes on which Ray may place an engine, and return what was collected, for `warn_of_nodes`.

    Raises ClusterResourceError with every error of a node that declares NPUs; those of others are logged.
    """
    snapshot = _collect([node for node in current_nodes() if not node.draining])
    _refuse(refusing_findings(snapshot, all_used=False))
    return snapshot


def warn_of_nodes(snapshot: Snapshot, node_ids: Collection[str]) -> None:
    """Log what is wrong with these nodes, those of an engine, each once in a process."""
    for finding in warnings_of_nodes(snapshot, node_ids, os.environ):
        _report_once(str(finding))


def refusing_findings(snapshot: Snapshot, *, all_used: bool) -> list[Finding]:
    """Return errors, which keep an engine from starting, and warnings of how NPUs are declared. Pure.

    ``all_used``: the engine is placed on all these nodes; else errors of those that declare no NPU are warnings.
    """
    used = [record for record in snapshot.nodes if all_used or _declares_npus(record)]
    others = [record for record in snapshot.nodes if not all_used and not _declares_npus(record)]
    found = find(replace(snapshot, nodes=used), _REFUSING)
    found += map(_as_warning, find(replace(snapshot, nodes=others, failures=[]), _REFUSING))
    return [finding for finding in found if finding.severity in ("error", "warning")]


def warnings_of_nodes(snapshot: Snapshot, node_ids: Collection[str], environ: Mapping[str, str]) -> list[Finding]:
    """Return what else is wrong with the nodes of an engine: with each, and between them. Pure.

    ``environ`` is the driver's environment: what workers get from there may differ on nodes.
    """
    used = [record for record in snapshot.nodes if record.ray and record.ray.node_id in node_ids]
    raylets = {record.ray.raylet for record in used if record.ray}
    return [
        _as_warning(finding)
        for finding in find(replace(snapshot, nodes=used, failures=[]), _WARNING)
        if finding.severity in ("error", "warning")
        and finding.values.get("variable", "") not in environ
        and ("peer" not in finding.values or finding.values["peer"] in raylets)
    ]


def _declares_npus(record: NodeRecord) -> bool:
    return record.ray is not None and record.ray.npus > 0


def _collect(nodes: Collection[NodeResources]) -> Snapshot:
    """Return a snapshot of these nodes. One without NPUs and GPUs that does not answer is left out."""
    peers = [node.node_id for node in nodes if node.npus]
    snapshot = snapshot_of_nodes(nodes, peers, "quick", (), _LIMIT_S)
    matter = {node.address for node in nodes if node.npus or node.gpus}
    return replace(snapshot, failures=[failure for failure in snapshot.failures if failure.address in matter])


def _refuse(findings: Collection[Finding]) -> None:
    for warning in raise_for_findings(findings):
        _report_once(str(warning))


def _as_warning(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.severity == "error" else finding


@functools.cache
def _report_once(text: str) -> None:
    logger.warning("%s", text)
