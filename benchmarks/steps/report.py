"""The figures of a run as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import duration, head, row
from benchmarks.statistics import Sample, figures, interval, ratios, verdict
from benchmarks.steps.options import GOALS

_COUNTS = ("waits of the engine", "waits of workers")
_LEGEND = (
    "Each cell: median a step, then the median of the ratio to `{base}` in the same round, with the interval in which "
    "it lies with 95 % (bootstrap over the rounds). A ratio of 1 within the interval is no difference that was found."
)


def markdown(run: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """Return the tables of all cases, and the goals with what was found."""
    options = run["options"]
    found = figures(samples, options["base"])
    of_rounds = ratios(samples, options["base"])
    lines = [*head(run), "", _LEGEND.format(base=options["base"])]
    for case in options["cases"]:
        metrics = list(dict.fromkeys(sample.metric for sample in samples if sample.case == case))
        titles = ["", *options["executors"]]
        lines += ["", f"## {case}", "", row(titles), row(["---"] * len(titles))]
        for metric in metrics:
            cells = []
            for executor in options["executors"]:
                key = (case, metric, executor)
                text = _value(metric, found[key].median) if key in found else ""
                if executor != options["base"] and of_rounds.get(key):
                    least, median, most = interval(of_rounds[key])
                    text += f", **{median:.3f}** [{least:.3f}, {most:.3f}]"
                cells.append(text)
            lines.append(row([metric, *cells]))
    return "\n".join([*lines, *_goals(of_rounds)]) + "\n"


def _goals(of_rounds: Mapping[tuple[str, str, str], list[float]]) -> list[str]:
    rows = []
    for goal in GOALS:
        if values := of_rounds.get((goal.case, goal.metric, "ours")):
            least, median, most = spread = interval(values)
            text = f"{median:.3f} [{least:.3f}, {most:.3f}]"
            rows.append(row([goal.case, goal.metric, f"{goal.ratio:.2f}", text, verdict(spread, goal.ratio)]))
    titles = ["case", "metric", "at most", "ours", ""]
    return ["", "## Goals", "", row(titles), row(["---"] * len(titles)), *rows] if rows else []


def _value(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric in _COUNTS else duration(value)
