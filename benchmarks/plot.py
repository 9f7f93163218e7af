"""The figures of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.options import BASE
from benchmarks.phases import PHASES
from benchmarks.statistics import Figure

Figures = Mapping[tuple[str, str, str], Figure]
_COLOURS = {
    "mp": "#555555",
    "upstream": "#d98e04",
    "ours": "#1f6feb",
    "mp-fork": "#aaaaaa",
    "compiled_graph": "#8250df",
    "upstream-graph": "#cf222e",
}
_LEAST_RATIO, _MOST_RATIO = 0.02, 50.0


def plot(run: Mapping[str, Any], figures: Figures, path: Path) -> None:
    """Draw ratios and phases of a start for each case into ``path``, a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases = run["options"]["cases"]
    figure, axes = pyplot.subplots(
        len(cases), 2, figsize=(15, 1 + 4.2 * len(cases)), squeeze=False, layout="constrained"
    )
    for (left, right), case in zip(axes, cases, strict=True):
        _ratios(left, case, run["options"]["executors"], figures)
        _phases(right, case, run["options"]["executors"], figures)
    figure.suptitle(f"vllm-ray-ascend {run['commit']} on {run['machine']['cores']} cores with software NPUs")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratios(axes: Any, case: str, executors: list[str], figures: Figures) -> None:
    metrics = [metric for metric in _metrics(case, figures) if not metric.startswith("start: ")]
    others = [executor for executor in executors if executor != BASE]
    for offset, executor in enumerate(others):
        shift = (offset - (len(others) - 1) / 2) * 0.25
        for row, metric in enumerate(metrics):
            of_metric = figures.get((case, metric, executor))
            if of_metric is None or of_metric.ratio is None:
                continue
            least, median, most = (min(max(each, _LEAST_RATIO), _MOST_RATIO) for each in of_metric.ratio)
            colour = _COLOURS[executor]
            axes.plot([least, most], [row + shift] * 2, color=colour, linewidth=2, alpha=0.5)
            axes.plot(median, row + shift, "o", color=colour, markersize=5)
        axes.plot([], [], "o", color=_COLOURS[executor], label=executor)
    axes.axvline(1.0, color=_COLOURS[BASE], linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(metrics)), metrics)
    axes.invert_yaxis()
    axes.set_title(f"{case}: time, as a multiple of {BASE}'s in the same round (median, least to most)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best")


def _phases(axes: Any, case: str, executors: list[str], figures: Figures) -> None:
    left = dict.fromkeys(executors, 0.0)
    for phase in PHASES:
        widths = [_median(figures.get((case, f"start: {phase}", executor))) for executor in executors]
        axes.barh(executors, widths, left=list(left.values()), label=phase)
        left = {executor: left[executor] + width for executor, width in zip(executors, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"{case}: start by phase (medians)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _median(figure: Figure | None) -> float:
    return figure.median if figure is not None else 0.0


def _metrics(case: str, figures: Figures) -> list[str]:
    return list(dict.fromkeys(metric for of_case, metric, _ in figures if of_case == case))
