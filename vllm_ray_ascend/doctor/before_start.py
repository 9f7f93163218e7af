"""The checks that are made before each start of an engine: those of `doctor` that ask no tool, on the engine's nodes.

The same code, and the same messages. An error of how NPUs are declared to Ray keeps the engine from starting. Whatever
else is found is a warning in the log: it may be meant, and vLLM's own executor would start as well.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from vllm_ray_ascend.cluster.audit import raise_for_findings
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.placement_groups import current_nodes
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.gather import snapshot_of_nodes
from vllm_ray_ascend.doctor.judge import find
from vllm_ray_ascend.doctor.records import NodeRecord, Snapshot
from vllm_ray_ascend.doctor.views import Check
from vllm_ray_ascend.log import get_logger

_LIMIT_S = 20.0
_REFUSING = [check for check in CHECKS.values() if check.at_start == "refuses"]
_WARNING = [check for check in CHECKS.values() if check.at_start == "warns"]

logger = get_logger(__name__)


def check_nodes(node_ids: Collection[str] | None = None, *, spans_nodes: bool = True) -> None:
    """Check nodes of the joined cluster, and log warnings, each once in a process.

    These are the nodes ``node_ids``, or all nodes, of which an engine may use those that declare NPUs. Unless it
    ``spans_nodes``, they are not compared with each other.
    Raises ClusterResourceError with every error of a node that the engine may use.
    """
    nodes = [node for node in current_nodes() if node_ids is None or node.node_id in node_ids]
    peers = [node.node_id for node in nodes if node.npus] if spans_nodes else []
    snapshot = snapshot_of_nodes(nodes, peers, "quick", (), _LIMIT_S)
    with_devices = {node.address for node in nodes if node.npus or node.gpus}
    failures = [failure for failure in snapshot.failures if failure.address in with_devices]
    snapshot = replace(snapshot, failures=failures)
    found = findings_at_start(snapshot, os.environ, all_used=node_ids is not None, spans_nodes=spans_nodes)
    for warning in raise_for_findings(found):
        _report_once(str(warning))


def findings_at_start(
    snapshot: Snapshot, environ: Mapping[str, str], *, all_used: bool, spans_nodes: bool
) -> list[Finding]:
    """Return the errors and warnings of a snapshot before a start. Pure.

    ``environ`` is the driver's environment, whose variables of HCCL its workers get. ``all_used``: the engine is
    placed on all these nodes; else errors of those that declare no NPU to Ray are warnings.
    """
    used = [record for record in snapshot.nodes if all_used or _declares_npus(record)]
    others = [record for record in snapshot.nodes if record not in used]
    refusing = find(replace(snapshot, nodes=used), _REFUSING)
    groups = [used] if spans_nodes else [[record] for record in used]
    warning = [finding for group in groups for finding in _find(snapshot, group, _WARNING)]
    warning += _find(snapshot, others, _REFUSING)
    found = [*refusing, *map(_as_warning, warning)]
    return [each for each in found if each.severity in ("error", "warning") and not _is_copied(each, environ)]


def _find(snapshot: Snapshot, nodes: Sequence[NodeRecord], checks: Sequence[Check]) -> list[Finding]:
    return find(replace(snapshot, nodes=list(nodes), failures=[]), checks)


def _is_copied(finding: Finding, environ: Mapping[str, str]) -> bool:
    """Return whether it is about a variable that workers get from the driver, whatever is set on their nodes."""
    return finding.values.get("variable", "") in environ


def _declares_npus(record: NodeRecord) -> bool:
    return bool(record.ray and record.ray.npus)


def _as_warning(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.severity == "error" else finding


@functools.cache
def _report_once(text: str) -> None:
    logger.warning("%s", text)
