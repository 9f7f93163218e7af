"""The figures of a run as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report import Figures, duration, head, row, table
from benchmarks.statistics import Figure, interval, verdict
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
        if executor != base and figure.ratios:
            least, median, most = interval(figure.ratios)
            text += f", **{median:.3f}** [{least:.3f}, {most:.3f}]"
        return text

    lines = [*head(run), "", _LEGEND.format(base=base)]
    for case in options["cases"]:
        lines += ["", f"## {case}", "", *table(case, options["executors"], figures, cell)]
    return "\n".join([*lines, *_goals(figures)]) + "\n"


def _goals(figures: Figures) -> list[str]:
    rows = []
    for goal in GOALS:
        figure = figures.get((goal.case, goal.metric, "ours"))
        if figure is not None and figure.ratios:
            least, median, most = spread = interval(figure.ratios)
            text = f"{median:.3f} [{least:.3f}, {most:.3f}]"
            rows.append(row([goal.case, goal.metric, f"{goal.ratio:.2f}", text, verdict(spread, goal.ratio)]))
    titles = ["case", "metric", "at most", "ours", ""]
    return ["", "## Goals", "", row(titles), row(["---"] * len(titles)), *rows] if rows else []
