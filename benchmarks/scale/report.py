"""The goals of large engines, and the figures of a run as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Point = Mapping[str, float]


class Goal(NamedTuple):
    """``metric`` stays below ``limit`` at ``ranks``."""

    metric: str
    ranks: int
    limit: float


GOALS = (
    Goal("connect_with_sentinels", 1024, 5.0),
    Goal("ask_longest", 2048, 1.0),
    Goal("silent", 2048, 1),
    Goal("death_p99", 1024, 0.1),
    Goal("place_dp", 1024, 1.0),
    Goal("place_dp_of_one", 1024, 1.0),
    Goal("place_groups", 1024, 1.0),
)
METRICS = {
    "connect": "all ranks connected",
    "connect_with_sentinels": "... with their exit sentinels",
    "ask": "all ranks asked (median)",
    "ask_longest": "all ranks asked (longest)",
    "death": "death to notice (median)",
    "death_p99": "death to notice (p99)",
    "death_to_callback": "first death to failure callback",
    "stop": "stop until all are gone",
    "place_dp": "plan of data parallel ranks of 8 NPUs",
    "place_dp_of_one": "... of 1 NPU",
    "place_groups": "ranks to nodes",
    "order_bundles": "ranks to bundles",
    "registry": "record: write, read, check owners",
    "audit": "audit of all nodes",
}


def judge(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return each goal whose number of ranks was measured, with the figure and whether it is met."""
    by_ranks = {point["ranks"]: point for point in points}
    found = {goal: by_ranks[goal.ranks][goal.metric] for goal in GOALS if goal.ranks in by_ranks}
    return [{**goal._asdict(), "found": value, "met": value < goal.limit} for goal, value in found.items()]


def markdown(run: Mapping[str, Any]) -> str:
    """Return the figures as tables."""
    points = run["points"]
    machine = run["machine"]
    lines = [
        f"# Large engines: {run['date']}, commit {run['commit']}, {machine['cores']} cores",
        "",
        f"Load of the machine: {machine['load_before'][0]:.1f} before, {run['load_after']:.1f} after.",
        "",
        "| ranks | " + " | ".join(str(point["ranks"]) for point in points) + " |",
        "|---|" + "---|" * len(points),
        *(
            f"| {title} | " + " | ".join(_time(point[metric]) for point in points) + " |"
            for metric, title in METRICS.items()
        ),
        "| counted as silent, wrongly | " + " | ".join(str(point["silent"]) for point in points) + " |",
        "",
        "| goal | found | met |",
        "|---|---|---|",
        *(
            f"| {METRICS.get(goal['metric'], 'wrongly silent')} at {goal['ranks']} ranks: below {goal['limit']:g} | "
            f"{goal['found']:.4g} | {'yes' if goal['met'] else 'no'} |"
            for goal in run["goals"]
        ),
    ]
    return "\n".join(lines) + "\n"


def plot(run: Mapping[str, Any], path: Path) -> None:
    """Draw every cost over the number of ranks into ``path``, a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    ranks = [point["ranks"] for point in run["points"]]
    for number, (metric, title) in enumerate(METRICS.items()):
        values = [max(point[metric], 1e-7) for point in run["points"]]
        (line,) = axes.plot(ranks, values, marker="o", markersize=4, label=title, color=f"C{number % 10}")
        if number >= 10:
            line.set_linestyle("--")
        for goal in run["goals"]:
            if goal["metric"] == metric:
                axes.plot(goal["ranks"], goal["limit"], marker="v", markersize=10, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds (triangles: goals)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(f"vllm-ray-ascend {run['commit']} on {run['machine']['cores']} cores")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
