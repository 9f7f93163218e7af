"""The table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine

_FIGURES = {
    "cpu_s": "CPU time of the engine's thread",
    "wall_s": "the call in the engine's thread",
    "all_have_s": "until all ranks have it",
    "writer_cpu_s": "CPU time of the engine's process",
    "ranks_cpu_s": "CPU time of all ranks",
}


def markdown(run: Mapping[str, Any]) -> str:
    """Return the table: median milliseconds a message over all rounds, least and greatest of all in brackets."""
    turns: list[dict[str, Any]] = run["turns"]
    keys = list(dict.fromkeys((turn["nodes"], turn["ranks"], turn["way"]) for turn in turns))
    loads = [turn["load"] for turn in turns]
    where = describe_machine(run["machine"])
    lines = [
        "# An engine's message to all ranks on other nodes",
        "",
        f"Commit {run['commit']}, {run['date']}, {where}, then {min(loads):.0f} to {max(loads):.0f}.",
        f"Milliseconds a message of {run['size']} bytes: medians, in brackets the least and the greatest.",
        "",
        f"| nodes x ranks | a connection to each of the | {' | '.join(_FIGURES.values())} |",
        f"|{'---|' * (2 + len(_FIGURES))}",
    ]
    for key in keys:
        found = [turn for turn in turns if (turn["nodes"], turn["ranks"], turn["way"]) == key]
        cells = [_cell([turn[figure] for turn in found]) for figure in _FIGURES]
        lines.append(f"| {key[0]} x {key[1]} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Sequence[Any]) -> str:
    values = [1000 * value for each in found for value in (each if isinstance(each, list) else [each])]
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
