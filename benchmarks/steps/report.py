"""The figures of a run as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report import Figures, duration, format_ratio, goals_table, head, table
from benchmarks.statistics import Figure
from benchmarks.steps.options import GOALS

_COUNTS = ("waits of the engine", "waits of workers")
_LEGEND = (
    "Each cell: median a step, then the median of the ratio to `{base}` in the same round, with the interval in which "
    "it lies with 95 % (bootstrap over the rounds). A ratio of 1 within the interval is no difference that was found."
)


def markdown(run: Mapping[str, Any], figures: Figures) -> str:
    """Return the tables of all cases, and the goals with what was found."""
    options = run["options"]
    base = options["base"]

    def cell(metric: str, executor: str, figure: Figure) -> str:
        text = f"{figure.median:.2f}" if metric in _COUNTS else duration(figure.median)
        if executor != base and figure.ratio is not None:
            text += f", {format_ratio(figure.ratio, 3)}"
        return text

    lines = [*head(run), "", _LEGEND.format(base=base)]
    for case in options["cases"]:
        lines += ["", f"## {case}", "", *table(case, options["executors"], figures, cell)]
    return "\n".join([*lines, *goals_table(GOALS, figures)]) + "\n"
