"""The figures of a run as Markdown. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.options import BASE
from benchmarks.statistics import Figure, Goal, Sample, Spread, verdict

Figures = Mapping[tuple[str, str, str], Figure]
_DECIMALS = 7  # a tenth of a microsecond

_LEGEND = (
    f"Each cell: median (99th percentile), then the median of the ratio to `{BASE}` in the same round, with the "
    "interval in which it lies with 95 % (bootstrap over the rounds). Ratios are what counts: seconds are those of "
    "this machine and its load."
)


def markdown(run: Mapping[str, Any], figures: Figures, goals: Iterable[Goal] = ()) -> str:
    """Return a title, what the figures mean, a table for each case, and the goals with what was found."""
    lines = [*head(run), "", _LEGEND]
    for case in run["options"]["cases"]:
        lines += ["", f"## {case}", "", *table(case, run["options"]["executors"], figures, _cell)]
    return "\n".join([*lines, *goals_table(goals, figures)]) + "\n"


def goals_table(goals: Iterable[Goal], figures: Figures) -> list[str]:
    """Return the lines of a table of the ``goals`` that were measured, each with what was found and a verdict."""
    rows = []
    for goal in goals:
        figure = figures.get((goal.case, goal.metric, "ours"))
        if figure is not None and figure.ratio is not None:
            found = format_ratio(figure.ratio, 3)
            rows.append(row([goal.case, goal.metric, f"{goal.ratio:.2f}", found, verdict(figure.ratio, goal.ratio)]))
    titles = ["case", "metric", "at most", "ours", ""]
    return ["", "## Goals", "", row(titles), row(["---"] * len(titles)), *rows] if rows else []


def head(run: Mapping[str, Any]) -> list[str]:
    """Return the title, and where, when and with what it was measured."""
    return [
        f"# Benchmark `{run['options']['name']}`, commit {run['commit']}",
        "",
        f"{describe_machine(run['machine'])}; software NPUs; "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f"; {run['began']}, {run['seconds'] / 60:.0f} minutes.",
    ]


def table(case: str, executors: Sequence[str], figures: Figures, cell: Callable[[str, str, Figure], str]) -> list[str]:
    """Return the lines of a case's table: a row for each metric. ``cell`` is given metric, executor and figure."""
    metrics = list(dict.fromkeys(metric for of_case, metric, _ in figures if of_case == case))

    def text(metric: str, executor: str) -> str:
        figure = figures.get((case, metric, executor))
        return "" if figure is None else cell(metric, executor, figure)

    rows = [[metric, *(text(metric, executor) for executor in executors)] for metric in metrics]
    titles = ["", *executors]
    return [row(titles), row(["---"] * len(titles)), *map(row, rows)]


def row(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def _cell(_: str, executor: str, figure: Figure) -> str:
    text = duration(figure.median)
    if figure.size > 1:
        text += f" ({duration(figure.p99)})"
    if executor != BASE and figure.ratio is not None:
        text += f", {format_ratio(figure.ratio)}"
    return text


def format_ratio(found: Spread, digits: int = 2) -> str:
    """Format a ratio and its interval."""
    return f"**{found.median:.{digits}f}** [{found.least:.{digits}f}, {found.most:.{digits}f}]"


def as_json(run: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """Return readable JSON with one line per sample, so that two runs can be compared line by line."""
    whole = json.dumps(run, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(_plain(sample)) for sample in samples)
    return f'{whole},\n "samples": [\n{lines}\n ]\n}}\n'


def _plain(sample: Sample) -> dict[str, Any]:
    return {**sample._asdict(), "values": [round(value, _DECIMALS) for value in sample.values]}


def duration(seconds: float) -> str:
    """Format seconds with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
