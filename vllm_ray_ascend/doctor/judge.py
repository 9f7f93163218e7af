"""Findings of a snapshot. Pure: what was saved can be judged again, anywhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from vllm_ray_ascend.cluster.audit import UNANSWERED, Driver, unreachable_finding
from vllm_ray_ascend.cluster.findings import WORST_FIRST, Finding, Severity, join
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.checks.model import MODEL
from vllm_ray_ascend.doctor.compare import changes_between
from vllm_ray_ascend.doctor.links import judge_links
from vllm_ray_ascend.doctor.records import ExitCode, Level, NodeRecord, NodeSummary, Report, Snapshot, Status
from vllm_ray_ascend.doctor.views import Check, NodeView, has_npus, with_roce
from vllm_ray_ascend.errors import DoctorError

EXIT_CODES: Mapping[Status, ExitCode] = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
"""As monitoring systems take them from plugins of Nagios."""


def choose_checks(
    level: Level, only: Collection[str] = (), skipped: Collection[str] = (), *, with_model: bool = False
) -> list[Check]:
    """Return the checks of a level, or those named, without those skipped. Raise DoctorError for unknown names.

    That of a model's files is made where a path is given for it, ``with_model``.
    """
    if wrong := sorted({*only, *skipped} - CHECKS.keys()):
        raise DoctorError("VRA-602", f"There is no check {', '.join(wrong)}. The checks: {', '.join(CHECKS)}.")
    if MODEL in only and not with_model:
        raise DoctorError("VRA-698", f"Check {MODEL} looks at a path: `vllm-ray-ascend doctor --model PATH`.")
    chosen = [check for check in CHECKS.values() if check.name in only or (not only and level in ("full", check.level))]
    made = [check for check in chosen if check.name != MODEL] + ([CHECKS[MODEL]] if with_model else [])
    left = [check for check in made if check.name not in skipped]
    if not left:
        raise DoctorError("VRA-622", "No check is left: --skip names all that --checks and --level choose.")
    return left


def checks_of_full_level(made: Collection[str]) -> list[str]:
    """Return the names of the checks of level full, the rest of which were ``made``."""
    return [check.name for check in CHECKS.values() if check.level == "full" and check.name not in made]


def make_report(snapshot: Snapshot, checks: Sequence[Check], before: Snapshot | None = None) -> Report:
    """Return the report of a snapshot; with what has changed since the one ``before``."""
    found = map(_of_command, find(snapshot, checks))
    findings = sorted(found, key=lambda finding: WORST_FIRST.index(finding.severity))
    status = status_of(findings)
    return Report(
        version=snapshot.version,
        time=snapshot.time,
        level=snapshot.level,
        status=status,
        exit_code=EXIT_CODES[status],
        nodes=[_summary(record) for record in snapshot.nodes],
        unanswered=[failure.address for failure in snapshot.failures],
        checks=[check.name for check in checks],
        findings=findings,
        links=snapshot.links,
        changes=changes_between(before, snapshot) if before else [],
    )


def status_of(findings: Iterable[Finding]) -> Status:
    """Return the status of the worst finding: what is known to be wrong counts more than what is not known."""
    severities = {finding.severity for finding in findings}
    found: dict[Severity, Status] = {"error": "critical", "warning": "warning", "unknown": "unknown"}
    return next((status for severity, status in found.items() if severity in severities), "ok")


def find(snapshot: Snapshot, checks: Sequence[Check]) -> list[Finding]:
    """Return the findings of all checks on all nodes, and of nodes that did not answer."""
    nodes = _views(snapshot)
    failures = [
        unreachable_finding(failure.address, failure.npus, failure.reason, snapshot.version)
        for failure in snapshot.failures
    ]
    if not failures and not snapshot.left_out_npus and not any(node.has_npus for node in nodes):
        return [_no_npus()]
    checked = [replace(finding, check=check.name) for check in checks for finding in _run(check, nodes)]
    notes = [*_not_compared(snapshot, checks), *_not_made(nodes, checks)]
    return [*failures, *checked, *judge_links(snapshot.links, snapshot.busy), *notes]


def _of_command(finding: Finding) -> Finding:
    """Return a finding as the command has it: of a node that is late nothing is known; a start warns of it."""
    if finding.check != UNANSWERED:
        return finding
    remedy = f"{finding.remedy} Where the node is only busy: `vllm-ray-ascend doctor --timeout 120`."
    return replace(finding, severity="unknown", remedy=remedy)


def _not_compared(snapshot: Snapshot, checks: Sequence[Check]) -> Iterator[Finding]:
    """Yield a note where nodes were left out that some of the checks would compare with the others."""
    if snapshot.left_out and (names := [check.name for check in checks if check.of_cluster]):
        yield Finding(
            "",
            "info",
            "VRA-623",
            f"{join(names)} compare nodes, and have left out {join(snapshot.left_out)}.",
            "Without --nodes they compare all.",
        )


def _not_made(nodes: Iterable[NodeView], checks: Sequence[Check]) -> Iterator[Finding]:
    """Yield notes of what is not judged of a node that was looked at alone."""
    for node in nodes:
        if node.several is not None:
            continue
        if names := [check.name for check in checks if check.of_cluster or check.of_ray]:
            yield node.finding(
                "info",
                "VRA-624",
                "this node was looked at alone: what Ray has of it, and what other nodes have, is left out of "
                f"{join(names)}.",
                "`vllm-ray-ascend doctor` without --local, once Ray runs.",
            )
        roce = [check.name for check in checks if check.applies is with_roce]
        if node.has_npus and not node.has_roce and roce:
            yield node.finding(
                "info",
                "VRA-625",
                f"its RoCE ports have no addresses, and {join(roce)} were left out.",
                "Where it is to work with other nodes, give each port one, `sudo hccn_tool -i NPU -ip -s address "
                "ADDRESS netmask NETMASK`, then `vllm-ray-ascend doctor --local` again.",
            )


def _run(check: Check, nodes: Sequence[NodeView]) -> Iterator[Finding]:
    nodes = [node for node in nodes if check.applies(node)]
    for query in check.queries:
        for node in nodes:
            yield from node.unknown_answers(query)
    if check.of_cluster:
        yield from check.judge(nodes) if nodes else ()
    else:
        for node in nodes:
            yield from check.judge(node)


def _views(snapshot: Snapshot) -> list[NodeView]:
    driver = Driver(snapshot.versions, snapshot.switches)
    others = len(snapshot.failures) + (snapshot.left_out_npus > 0)
    several = sum(map(has_npus, snapshot.nodes)) + others > 1 if snapshot.head_address else None
    return [
        NodeView(record, several=several, head_address=snapshot.head_address, driver=driver)
        for record in snapshot.nodes
    ]


def _no_npus() -> Finding:
    return Finding(
        "",
        "unknown",
        "VRA-603",
        "No node has NPUs, nor declares any: there is nothing to check.",
        "Where there are NPUs, the driver is missing (`ls /dev/davinci*`, `npu-smi info`).",
    )


def _summary(record: NodeRecord) -> NodeSummary:
    view = NodeView(record, several=False, head_address="", driver=Driver())
    return NodeSummary(
        address=record.address,
        hostname=record.facts.hostname,
        npus=record.facts.cann_devices,
        chip=next((die.name for die in record.facts.dies), ""),
        driver=view.properties("driver").get("Version", ""),
        cann=view.cann_version,
    )
