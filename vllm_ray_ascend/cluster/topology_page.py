"""The topology as one HTML page without anything from elsewhere: nodes, NPUs, ranks in colours, findings. Pure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from vllm_ray_ascend.cluster.device_users import DeviceUser
from vllm_ray_ascend.cluster.findings import WORST_FIRST, Finding
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, engine_names
from vllm_ray_ascend.cluster.topology import NodeTopology, Npu, NpuOwner, Topology

Engines = Mapping[tuple[str, int], tuple[int, EngineRecord, str]]
"""By id and data parallel rank: the number of an engine on the page, its record, its name."""
_GOLDEN_ANGLE = 137.5
"""Degrees between the hues of neighbours: those of any count of engines or stages are far apart."""
_FIRST_HUE = 210
_ENGINE_COLUMNS = ("engine", "ranks", "TP", "PP", "nodes", "since", "driver", "placement group")
_LINK_COLUMNS = ("engine", "traffic", "from", "to", "doctor on these NPUs and nodes")
_SYMBOLS = {"error": "✖", "warning": "▲", "unknown": "?", "info": "i", "ok": "✔"}


def format_page(topology: Topology, findings: Sequence[Finding], made_at: float, reload_s: float | None = None) -> str:
    """Return the page. ``made_at`` in seconds since 1970; with ``reload_s`` a browser loads it again."""
    names = engine_names(topology.engines)
    engines = {
        (each.engine, each.dp_rank): (index, each, names[each.engine, each.dp_rank])
        for index, each in enumerate(topology.engines)
    }
    reload = f'<meta http-equiv="refresh" content="{reload_s:g}">' if reload_s else ""
    body = "\n".join(
        [
            *_head_lines(topology, findings, made_at),
            '<section class="nodes">',
            *(line for node in topology.nodes for line in _node_lines(node, engines, findings)),
            "</section>",
            *_engine_lines(topology, engines),
            *_link_lines(engines, findings),
            *_finding_lines(findings),
        ]
    )
    head = f'<meta charset="utf-8">{reload}<title>vllm-ray-ascend topology</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _head_lines(topology: Topology, findings: Sequence[Finding], made_at: float) -> Iterator[str]:
    npus = sum(len(node.npus) for node in topology.nodes)
    used = sum(bool(npu.owners) or bool(_users_of(node, npu)) for node in topology.nodes for npu in node.npus)
    worst = _worst(findings)
    yield "<header><h1>vllm-ray-ascend topology</h1>"
    yield (
        f"<p>{len(topology.nodes)} nodes, {npus} NPUs, {used} in use, {len(topology.engines)} engines. "
        f"doctor: {_mark(worst)}. {_format_time(made_at)}</p>"
    )
    yield '<p class="choice">Colours by <label><input type="radio" name="by" id="dp" checked> engine (DP)</label>'
    yield '<label><input type="radio" name="by" id="pp"> pipeline stage (PP)</label>'
    yield '<label><input type="radio" name="by" id="tp"> tensor parallel rank (TP)</label></p></header>'


def _node_lines(node: NodeTopology, engines: Engines, findings: Sequence[Finding]) -> Iterator[str]:
    own = [finding for finding in findings if finding.address == node.address]
    worst = _worst(own)
    yield f'<article class="node"><h2>{escape(node.address)} <small>{escape(node.hostname)}</small>'
    yield f'<span class="{worst}" title="doctor">{_SYMBOLS[worst]} {worst}</span></h2>'
    yield f"<p>{node.declared:g} {node.device_key}s, {node.free:g} free</p>"
    yield '<div class="npus">'
    for npu in node.npus:
        yield from _npu_lines(npu, node, engines, [each for each in own if each.physical_id == npu.physical_id])
    yield "</div>"
    for finding in own:
        yield _finding_line(finding)
    yield "</article>"


def _npu_lines(npu: Npu, node: NodeTopology, engines: Engines, findings: Sequence[Finding]) -> Iterator[str]:
    worst = _worst(findings)
    badge = "" if worst == "ok" else f'<span class="{worst}">{_SYMBOLS[worst]}</span>'
    users = _users_of(node, npu)
    empty = "" if npu.owners or users else " free"
    yield f'<div class="npu{empty}"><b>{escape(npu.name)}</b>{badge}'
    for owner in npu.owners:
        yield from _owner_lines(owner, engines)
    for user in users:
        yield f'<span class="other" title="{escape(str(user), quote=True)}">{escape(str(user))}</span>'
    yield "</div>"


def _owner_lines(owner: NpuOwner, engines: Engines) -> Iterator[str]:
    index, engine, name = engines[owner.engine, owner.dp_rank]
    position = _position(engine, owner.rank)
    hues = {"dp": index, "pp": position[0], "tp": position[1]} if position else {"dp": index, "pp": 0, "tp": 0}
    style = ";".join(f"--{dimension}:{_hue(number)}" for dimension, number in hues.items())
    place = f"PP {position[0]} TP {position[1]}" if position else ""
    title = f"{name}, rank {owner.rank}, process {owner.pid}, bundle {owner.bundle_index}"
    yield f'<span class="rank" style="{style}" title="{escape(title, quote=True)}">{escape(name)}<br>'
    yield f"rank {owner.rank} <small>{place}</small></span>"


def _position(engine: EngineRecord, rank: int) -> tuple[int, int] | None:
    """Return pipeline stage and tensor parallel rank; None for records of earlier versions, which lack the sizes."""
    if not engine.tensor_parallel or not engine.pipeline_parallel:
        return None
    ranks_of_stage = max(1, len(engine.ranks) // engine.pipeline_parallel)
    return rank // ranks_of_stage, rank % engine.tensor_parallel


def _engine_lines(topology: Topology, engines: Engines) -> Iterator[str]:
    yield "<h2>Engines</h2><table><tr>" + "".join(f"<th>{each}" for each in _ENGINE_COLUMNS) + "</tr>"
    for index, engine, name in engines.values():
        nodes = ", ".join(sorted({rank.address for rank in engine.ranks}))
        deployment = topology.deployments.get(engine.group, "")
        cells = [
            escape(name) + (f"<br>{escape(deployment)}" if deployment else ""),
            str(len(engine.ranks)),
            str(engine.tensor_parallel or ""),
            str(engine.pipeline_parallel or ""),
            escape(nodes),
            _format_time(engine.started),
            f"{escape(engine.address)} process {engine.pid}",
            escape(engine.group[:12]),
        ]
        yield f'<tr style="--dp:{_hue(index)}" class="engine"><td>' + "<td>".join(cells) + "</tr>"
    for group in topology.groups:
        yield (
            f'<tr><td colspan="8">placement group {escape(group.name or group.group)}: {group.npus:g} '
            f"{group.device_key}s, not of an engine of this plugin</tr>"
        )
    yield "</table>" if topology.engines else "</table><p>no engine is running</p>"


def _link_lines(engines: Engines, findings: Sequence[Finding]) -> Iterator[str]:
    yield "<h2>Links between nodes</h2>"
    rows = [(index, name, *link) for index, engine, name in engines.values() for link in links_between_nodes(engine)]
    if not rows:
        yield "<p>none: no engine has ranks on several nodes</p>"
        return
    yield "<table><tr>" + "".join(f"<th>{each}" for each in _LINK_COLUMNS) + "</tr>"
    for index, name, what, *ends in rows:
        worst = _worst([each for each in findings for end in ends if _is_about(each, end)])
        places = (f"{escape(end[0].address)} NPU {', '.join(str(rank.physical_id) for rank in end)}" for end in ends)
        yield (
            f'<tr style="--dp:{_hue(index)}" class="engine"><td>{escape(name)}<td>{what}<td>'
            + "<td>".join([*places, _mark(worst)])
            + "</tr>"
        )
    yield "</table>"


def links_between_nodes(engine: EngineRecord) -> list[tuple[str, list[RankRecord], list[RankRecord]]]:
    """Return what an engine's ranks exchange between nodes, and which ranks on the one and on the other node do.

    Pipeline stages send to the next one, rank by rank; tensor parallel ranks of a stage exchange with all others.
    """
    found: dict[tuple[str, str, str], tuple[list[RankRecord], list[RankRecord]]] = {}
    position = {each.rank: _position(engine, each.rank) for each in engine.ranks}
    for one, other in itertools.permutations(engine.ranks, 2):
        here, there = position[one.rank], position[other.rank]
        if here is None or there is None or one.address == other.address:
            continue
        if (here[0] + 1, here[1]) == there:
            what = f"PP {here[0]} → {there[0]}"
        elif here[0] == there[0] and one.rank < other.rank:
            what = f"TP of stage {here[0]}"
        else:
            continue
        ends = found.setdefault((what, one.address, other.address), ([], []))
        for end, rank in zip(ends, (one, other), strict=True):
            if rank not in end:
                end.append(rank)
    return [(what, *ends) for (what, *_), ends in found.items()]


def _is_about(finding: Finding, ranks: Sequence[RankRecord]) -> bool:
    """Return whether a finding is about the NPU or the node of one of ``ranks``."""
    return any(finding.address == each.address and finding.physical_id in (None, each.physical_id) for each in ranks)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    yield "<h2>Findings of doctor</h2>"
    for finding in sorted(findings, key=lambda each: WORST_FIRST.index(each.severity)):
        yield _finding_line(finding)
    if not findings:
        yield "<p>none</p>"


def _finding_line(finding: Finding) -> str:
    npu = "" if finding.physical_id is None else f", NPU {finding.physical_id}"
    place = escape(finding.address or "cluster") + npu
    text, remedy = escape(finding.text), escape(finding.remedy)
    return f'<p class="finding">{_mark(finding.severity)} {finding.code} {place}: {text}<br>{remedy}</p>'


def _users_of(node: NodeTopology, npu: Npu) -> list[DeviceUser]:
    return [user for user in node.users if npu.physical_id in user.physical_ids]


def _hue(number: int) -> str:
    return f"{(_FIRST_HUE + number * _GOLDEN_ANGLE) % 360:g}"


def _mark(severity: str) -> str:
    return f'<b class="{severity}">{_SYMBOLS[severity]} {severity}</b>'


def _worst(findings: Sequence[Finding]) -> str:
    severities = {finding.severity for finding in findings if finding.severity != "info"}
    return next((severity for severity in WORST_FIRST if severity in severities), "ok")


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; --line: #8886; }
body { margin: 1.5rem; max-width: 1500px }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: .2rem 0 }
small { opacity: .7; font-weight: normal } label { margin-right: 1rem }
.nodes { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 1rem; margin: 1rem 0 }
.node { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem }
.node h2 span { float: right }
.npus { display: grid; grid-template-columns: repeat(4, 1fr); gap: .4rem }
.npu { border: 1px solid var(--line); border-radius: 6px; padding: .35rem; min-height: 4.4rem; overflow: hidden }
.npu > span { float: right } .npu.free { border-style: dashed; opacity: .6 }
.npu > .rank, .npu > .other { float: none; display: block; margin-top: .25rem; padding: .2rem .35rem;
  border-radius: 4px; font-size: .8rem; overflow-wrap: anywhere }
.npu > .other { background: #8883 }
.rank { background: hsl(var(--hue) 70% 82%); color: #111; border-left: 5px solid hsl(var(--hue) 65% 42%) }
.rank, .engine { --hue: var(--dp) }
body:has(#pp:checked) .rank { --hue: var(--pp) } body:has(#tp:checked) .rank { --hue: var(--tp) }
.engine td:first-child { border-left: 5px solid hsl(var(--hue) 65% 42%) }
table { border-collapse: collapse; margin-bottom: 1rem } th, td { text-align: left; padding: .25rem .7rem;
  border-bottom: 1px solid var(--line) }
.error { color: #d02020 } .warning { color: #b87000 } .unknown { color: #7060c0 } .ok { color: #208040 }
.finding { margin: .4rem 0 }
"""
