"""The tables of a run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.queues.plan import KIB, MIB

_FIGURES = {
    "call_s": "the call, in the writing thread",
    "all_have_s": "until all readers that are not slow have it",
    "writer_cpu_s": "CPU time of the writing process",
    "readers_cpu_s": "CPU time of these readers, together",
}


def markdown(run: dict[str, Any]) -> str:
    """Return the tables: median milliseconds per message, and the greatest in brackets."""
    turns: list[dict[str, Any]] = run["turns"]
    sizes = sorted({turn["size"] for turn in turns})
    ways = list(dict.fromkeys(turn["way"] for turn in turns))
    where = describe_machine(run["machine"])
    lines = ["# Message queues between two nodes", "", f"Commit {run['commit']}, {run['date']}, {where}."]
    for figure, title in _FIGURES.items():
        lines += ["", f"## Milliseconds a message: {title}", ""]
        lines += [f"| readers | way | {' | '.join(map(_label, sizes))} |", f"|{'---|' * (2 + len(sizes))}"]
        for readers, slow in dict.fromkeys((turn["readers"], turn["slow"]) for turn in turns):
            for way in ways:
                cells = [
                    _cell([turn[figure] for turn in turns if _key(turn) == (readers, slow, size, way)])
                    for size in sizes
                ]
                lines.append(f"| {readers}{', one slow' if slow else ''} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _key(turn: dict[str, Any]) -> tuple[int, bool, int, str]:
    return turn["readers"], turn["slow"], turn["size"], turn["way"]


def _cell(found: Sequence[Any]) -> str:
    values = [value for each in found for value in (each if isinstance(each, list) else [each])]
    if not values:
        return ""
    return f"{_milliseconds(median(values))} ({_milliseconds(max(values))})"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def _label(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
