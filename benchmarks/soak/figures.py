"""What a process group uses, and whether that grows. Pure functions of samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Sample = Mapping[str, float]

_WARM_UP_SHARE = 0.25  # of the samples: caches fill, imports end
_ALLOWED = {"files": 4.0, "threads": 4.0, "shm_files": 0.0, "shm_mb": 1.0, "memory_mb": 24.0}
"""Allowed growth of each resource of all processes of the engine together, from the first to the last quarter."""


class Growth(NamedTuple):
    """Medians of a resource in the first and in the last quarter after the warm-up."""

    resource: str
    first: float
    last: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it grew by no more than is allowed."""
        return self.last - self.first <= self.allowed


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Return the growth of every resource over ``samples``, which are in order of time. Needs at least eight."""
    steady = samples[int(len(samples) * _WARM_UP_SHARE) :]
    quarter = max(1, len(steady) // 4)
    return [
        Growth(
            resource,
            statistics.median(sample[resource] for sample in steady[:quarter]),
            statistics.median(sample[resource] for sample in steady[-quarter:]),
            allowed,
        )
        for resource, allowed in _ALLOWED.items()
    ]


def markdown(run: Mapping[str, Any]) -> str:
    """Return the figures of a run as text with a table."""
    requests = run["requests"]
    setting = (
        f"TP 2 x PP 2 on two nodes, {run['clients']} clients for {run['seconds'] / 60:.0f} minutes; the link between "
        f"the nodes slow for {run['slow_s']:g} s in every {run['period_s']:g} s."
    )
    result = (
        f"Requests: {requests['completed']} completed, of which {requests['right']} have the right text, "
        f"{requests['aborted']} aborted by their client, {requests['failed']} failed. Longest time without a token, "
        f"over all streams: {requests['longest_gap_s']:.1f} s."
    )
    lines = [
        f"# Soak: {run['date']}, commit {run['commit']}, {run['machine']['cores']} cores",
        "",
        setting,
        "",
        result,
        "",
        "| resource | first quarter | last quarter | allowed growth | |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each['resource']} | {each['first']:.1f} | {each['last']:.1f} | {each['allowed']:g} | "
        f"{'passed' if each['passed'] else 'GROWS'} |"
        for each in run["growth"]
    ]
    left = run["leftovers"]
    return "\n".join([*lines, "", f"Left over after the end: {', '.join(left) or 'nothing'}.", ""])
