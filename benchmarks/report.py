"""The figures of a run as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.options import BASE
from benchmarks.statistics import Figure

Figures = Mapping[tuple[str, str, str], Figure]


_LEGEND = (
    f"Each cell: median (99th percentile), and the ratio to `{BASE}` in the same round, median [least, most] over the "
    "rounds. Ratios are what counts: seconds are those of this machine and its load."
)


def markdown(run: Mapping[str, Any], figures: Figures) -> str:
    """A title, what the figures mean, and a table for each case."""
    machine, versions = run["machine"], run["versions"]
    lines = [
        f"# Benchmark `{run['options']['name']}`, commit {run['commit']}",
        "",
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"load {machine['load_before'][0]:.1f} when it began; software NPUs; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {run['began']}, {run['seconds'] / 60:.0f} minutes.",
        "",
        _LEGEND,
    ]
    for case in run["options"]["cases"]:
        lines += ["", f"## {case}", "", *_table(case, run["options"]["executors"], figures)]
    return "\n".join(lines) + "\n"


def _table(case: str, executors: Sequence[str], figures: Figures) -> list[str]:
    metrics = list(dict.fromkeys(metric for of_case, metric, _ in figures if of_case == case))
    rows = [
        [metric, *(_cell(figures.get((case, metric, executor)), executor != BASE) for executor in executors)]
        for metric in metrics
    ]
    head = ["", *executors]
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(figure: Figure | None, with_ratio: bool) -> str:
    if figure is None:
        return ""
    text = duration(figure.median)
    if figure.size > 1:
        text += f" ({duration(figure.p99)})"
    if with_ratio and figure.ratio is not None:
        least, median, most = figure.ratio
        text += f", **{median:.2f}** [{least:.2f}, {most:.2f}]"
    return text


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
