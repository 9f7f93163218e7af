"""What is found about each loss, and the tables of it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.recovery.clients import Answer
from benchmarks.report import row

GOAL_S = 1.0
"""By how much the longest time between two answers of the other rank may grow, in seconds."""

_SETTING = (
    "Two ranks on a node each, a third node is free, the server on a fourth. Seconds. The gap is the longest time "
    "between two answers of the rank that lives, while the other is down; before: in the seconds before the loss."
)


def longest_gap_s(answers: Iterable[Answer], start: float, end: float) -> float:
    """Return the longest time without an answer between ``start`` and ``end``, on the clock of the answers."""
    times = [start, *sorted(each.answered for each in answers if not each.error and start < each.answered < end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def figures(
    killed_at: float, baseline_s: float, back_at: float, lost: Sequence[Answer], others: Sequence[Answer]
) -> dict[str, Any]:
    """Return the figures of one loss. ``lost``: answers of the rank that was killed, ``others``: of the other one.

    ``baseline_s`` seconds before the loss are what its effect on the other rank is compared with.
    """
    running = [each for each in lost if each.sent < killed_at < each.answered]
    return {
        "requests": len(running),
        "failed": sum(bool(each.error) for each in running),
        "failed_after_s": max((each.answered - killed_at for each in running if each.error), default=None),
        "gap_before_s": longest_gap_s(others, killed_at - baseline_s, killed_at),
        "gap_s": longest_gap_s(others, killed_at, back_at),
        "others": sum(each.answered > killed_at for each in others),
        "others_failed": [each.error for each in others if each.error and each.answered > killed_at],
        "back_after_s": back_at - killed_at,
    }


def problems(losses: Sequence[Mapping[str, Any]], wanted: int) -> list[str]:
    """Return what is wrong with the figures of all losses, of which there are to be as many as ``wanted``."""
    found = [f"{len(losses)} of {wanted} losses, then the run ended"] if len(losses) < wanted else []
    for each in losses:
        name = f"{each['process']}, {each['phase']}, rank {each['rank']}"
        if each["gap_s"] - each["gap_before_s"] > GOAL_S:
            found.append(f"{name}: the other rank paused {each['gap_s']:.2f} s, before {each['gap_before_s']:.2f} s")
        found += [f"{name}: the other rank failed: {error}" for error in each["others_failed"][:1]]
    return found


def markdown(run: Mapping[str, Any]) -> str:
    """Return the table of a run."""
    titles = [
        *("killed", "phase", "rank", "its requests", "failed", "the last after", "longest gap of the other rank"),
        *("before", "back after"),
    ]
    lines = [
        f"# Loss of a data parallel rank: {run['date']}, commit {run['commit']}, {run['machine']['cores']} cores",
        "",
        _SETTING,
        "",
        row(titles),
        row(["---"] * len(titles)),
    ]
    for each in run["losses"]:
        after = each["failed_after_s"]
        cells = [
            *(each["process"], each["phase"], str(each["rank"]), str(each["requests"]), str(each["failed"])),
            *("" if after is None else f"{after:.2f}", f"{each['gap_s']:.2f}", f"{each['gap_before_s']:.2f}"),
            f"{each['back_after_s']:.1f}",
        ]
        lines.append(row(cells))
    return "\n".join([*lines, "", f"Wrong: {'; '.join(run['problems']) or 'nothing'}.", ""])
