"""The report for people: one screen when all is well. Pure."""

from __future__ import annotations

import re
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from vllm_ray_ascend.cluster.findings import WORST_FIRST, Finding, Severity, format_count, join
from vllm_ray_ascend.doctor.records import Link, NodeSummary, Report

Painter = Callable[[str, str], str]

_COLOURS = {"error": "31", "warning": "33", "unknown": "35", "info": "36", "ok": "32", "critical": "31"}
_WIDTH = 110
_ENDLESS = 1 << 20
_FOR_AN_NPU = re.compile(r"`((?:sudo )?hccn_tool -i )(\d+)\b([^`]*)`")
"""A command to which the NPU's physical id is given; npu-smi takes that of a card."""
_NOUNS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


def format_report(
    report: Report,
    *,
    colours: bool = False,
    is_terminal: bool = True,
    not_made: Sequence[str] = (),
    compared_at: float | None = None,
) -> Iterator[str]:
    """Yield the lines of a report: nodes, findings from the worst on, changes, the status.

    Lines are wrapped for a terminal. ``not_made``: names of checks that the level leaves out. ``compared_at``: when the
    snapshot of which changes are shown was taken, in seconds since 1970.
    """
    paint = _paint if colours else _plain
    npus = sum(node.npus or 0 for node in report.nodes)
    missing = f" of {len(report.nodes) + len(report.unanswered)}" if report.unanswered else ""
    yield (
        f"vllm-ray-ascend {report.version} doctor: {len(report.nodes)}{missing} "
        f"node{'' if len(report.nodes) == 1 and not missing else 's'}, {format_count(npus, 'NPU')}, "
        f"{format_count(len(report.checks), 'check')} ({report.level})"
    )
    for node in report.nodes:
        yield f"  {_format_node(node)}: {_format_counts(report.findings, node.address) or paint('ok', 'ok')}"
    for link in report.links:
        if not link.error:
            yield f"  {_format_link(link)}"
    for findings in _group(report.findings):
        yield ""
        yield from _format_group(findings, paint, _WIDTH if is_terminal else _ENDLESS)
    if compared_at is not None:
        yield ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(compared_at))
        changes = format_count(len(report.changes), "change")
        yield f"{changes} since the snapshot of {when}{':' if report.changes else '.'}"
        for change in report.changes:
            yield f"  {change.address}: {change.what}: {_short(change.before)} -> {_short(change.now)}"
    yield ""
    counts = _format_counts(report.findings)
    yield f"{paint(report.status.upper(), report.status)}{f': {counts}' if counts else ''}"
    if not_made:
        yield (
            f"Not made: {format_count(len(not_made), 'check')} of level full, such as {not_made[0]} "
            "(`vllm-ray-ascend doctor --level full`)."
        )


def _format_node(node: NodeSummary) -> str:
    versions = {"driver": node.driver, "CANN": node.cann}
    known = [f"{name} {version}" for name, version in versions.items() if version]
    npus = f"{format_count(node.npus, 'NPU')} {node.chip}".rstrip() if node.npus else "no NPUs"
    return f"{node.address} ({node.hostname}): {', '.join([npus, *known])}"


def _format_link(link: Link) -> str:
    ends = f"{link.first} NPU {link.first_physical_id} - {link.second} NPU {link.second_physical_id}"
    seconds = {"all-reduce": link.all_reduce_s, "send": link.send_s, "receive": link.receive_s}
    times = ", ".join(f"{name} {each * 1000:.1f} ms" for name, each in seconds.items())
    return f"HCCL {ends}: connected in {link.connect_s:.1f} s, 16 MiB: {times}; {link.memory_bytes >> 20} MiB"


def _format_counts(findings: Sequence[Finding], address: str | None = None) -> str:
    """Return how many findings there are of each severity, of one node or of all; empty where there is none."""
    counts = Counter(finding.severity for finding in findings if address in (None, finding.address))
    return join(
        format_count(counts[severity], _NOUNS[severity]) if severity in _NOUNS else f"{counts[severity]} {severity}"
        for severity in WORST_FIRST
        if counts[severity]
    )


def _group(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings, together those that say the same of several NPUs, or of several checks."""
    groups: defaultdict[tuple[str, ...], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.code, finding.address, finding.text].append(finding)
    return list(groups.values())


def _format_group(findings: Sequence[Finding], paint: Painter, width: int) -> Iterator[str]:
    first = findings[0]
    npus = list(dict.fromkeys(finding.physical_id for finding in findings if finding.physical_id is not None))
    place = f"{first.address}{f', NPU {join(npus)}' if npus else ''}: " if first.address else ""
    checks = list(dict.fromkeys(finding.check for finding in findings if finding.check))
    yield f"{paint(first.severity.upper(), first.severity)} {first.code}{f' [{join(checks)}]' if checks else ''}"
    for text, indents in ((f"{place}{first.text}", ("  ", "  ")), (_remedy(findings), ("  -> ", "     "))):
        yield from textwrap.wrap(
            text, width, initial_indent=indents[0], subsequent_indent=indents[1], break_on_hyphens=False
        )


def _remedy(findings: Sequence[Finding]) -> str:
    """Return the remedy of several findings: commands that differ by the NPU alone as a loop of the shell."""
    remedies = list(dict.fromkeys(finding.remedy for finding in findings))
    if len(remedies) == 1:
        return remedies[0]
    npus = " ".join(dict.fromkeys(str(finding.physical_id) for finding in findings))
    loops = {_FOR_AN_NPU.sub(rf"`for i in {npus}; do \1$i\3; done`", remedy) for remedy in remedies}
    return loops.pop() if len(loops) == 1 else f"{remedies[0]} Likewise for the other NPUs."


def _short(value: str | None) -> str:
    return "not there" if value is None else textwrap.shorten(value, 80, placeholder="...")


def _plain(text: str, _kind: str) -> str:
    return text


def _paint(text: str, kind: str) -> str:
    return f"\033[{_COLOURS[kind]}m{text}\033[0m"
