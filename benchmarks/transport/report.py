"""The figures of a transport run as Markdown and as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import duration, head, row
from benchmarks.statistics import Figure
from benchmarks.transport.options import BASE, EMPTY, label

Figures = Mapping[tuple[str, str, str], Figure]
_LEGEND = (
    "Time of one hop: median (99th percentile) of all rounds; bandwidth by the median; then its share of "
    f"`{BASE}`'s in the same round, median [interval of 95 %] over the rounds. Shares are what counts: the rest is "
    "this machine's, its load's and the software NPU's."
)
_COLOURS = {
    "raw": "#555555",
    "group": "#1f6feb",
    "graph-hccl": "#2da44e",
    "graph-host": "#d98e04",
    "direct": "#8250df",
    "ray-ascend": "#cf222e",
    "object-store": "#bbbbbb",
    "graph-empty": "#a7d7b3",
    "direct-empty": "#cdb8f0",
}


def markdown(run: Mapping[str, Any], figures: Figures) -> str:
    """Return a title, what the figures mean, and a table for each case."""
    ways = run["options"]["ways"]
    lines = [*head(run), "", _LEGEND]
    for case in run["options"]["cases"]:
        lines += ["", f"## {case}", "", row(["", *ways]), row(["---"] * (1 + len(ways)))]
        for size in run["options"]["sizes"]:
            lines.append(row([label(size), *(_cell(figures.get((case, label(size), way)), size, way) for way in ways)]))
        lines += _own_parts(run, case, figures)
    lines += [f"\nLeft out: {name}: {why}" for name, why in run["left_out"].items()]
    return "\n".join(lines) + "\n"


def _own_parts(run: Mapping[str, Any], case: str, figures: Figures) -> list[str]:
    """Return a table of what a hop of ours costs beyond Ray's part and beyond the transfer itself, where measured."""
    rows = []
    for size in map(label, run["options"]["sizes"]):
        for way, empty in EMPTY.items():
            found = [figures.get((case, size, each)) for each in (way, empty, BASE)]
            if all(found):
                whole, ray, raw = (each.median for each in found if each)
                own = f"{(whole - ray - raw) * 1e6:.0f} µs"
                rows.append(row([size, way, duration(whole), duration(ray), duration(raw), own]))
    titles = ["", "way", "a hop", "of that, Ray", f"`{BASE}`", "ours"]
    return ["", row(titles), row(["---"] * len(titles)), *rows] if rows else []


def _cell(figure: Figure | None, size: int, way: str) -> str:
    if figure is None:
        return ""
    text = f"{duration(figure.median)} ({duration(figure.p99)}), {size / figure.median / 1e6:.3g} MB/s"
    if way != BASE and figure.ratio is not None:
        least, median, most = (1 / each for each in reversed(figure.ratio))
        text += f", **{median:.2f}** [{least:.2f}, {most:.2f}]"
    return text


def plot(run: Mapping[str, Any], figures: Figures, path: Path) -> None:
    """Draw times and shares over sizes for each case into ``path``, a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases, ways, sizes = (run["options"][name] for name in ("cases", "ways", "sizes"))
    figure, axes = pyplot.subplots(
        len(cases), 2, figsize=(15, 1 + 4.2 * len(cases)), squeeze=False, layout="constrained"
    )
    for (left, right), case in zip(axes, cases, strict=True):
        for way in ways:
            found = [(size, figures[key]) for size in sizes if (key := (case, label(size), way)) in figures]
            if not found:
                continue
            xs = [size for size, _ in found]
            left.plot(xs, [each.median for _, each in found], "o-", color=_COLOURS[way], label=way, markersize=4)
            if way != BASE:
                shares = [1 / each.ratio.median if each.ratio else float("nan") for _, each in found]
                right.plot(xs, shares, "o-", color=_COLOURS[way], label=way, markersize=4)
        for each, title in (
            (left, "seconds a hop (medians)"),
            (right, f"bandwidth, share of {BASE}'s"),
        ):
            each.set_xscale("log", base=2)
            each.set_yscale("log")
            each.set_xticks(sizes, [label(size) for size in sizes], rotation=45)
            each.set_title(f"{case}: {title}")
            each.grid(alpha=0.3)
            if each.get_legend_handles_labels()[0]:
                each.legend(loc="best")
        right.axhline(1.0, color=_COLOURS[BASE], linewidth=1)
        right.axhline(0.95, color=_COLOURS[BASE], linewidth=1, linestyle=":")
    figure.suptitle(f"vllm-ray-ascend {run['commit']} on {run['machine']['cores']} cores with software NPUs")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
