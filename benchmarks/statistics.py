"""From samples to figures: percentiles, and ratios between executors of one run. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """Values in seconds of one metric of one executor in one round of a case."""

    case: str
    executor: str
    metric: str
    round: int
    values: list[float]


class Spread(NamedTuple):
    """A median and what surrounds it."""

    least: float
    median: float
    most: float


class Figure(NamedTuple):
    """One metric of one executor: percentiles of all its values, and its ratio to the base in each round that has both.

    ``size`` is the number of values.
    """

    median: float
    p99: float
    least: float
    most: float
    size: int
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> Spread | None:
        """The median of the ratios, in its interval; None where the base has no such metric."""
        return interval(self.ratios) if self.ratios else None


class Goal(NamedTuple):
    """The greatest ratio of ours to the base that is wanted."""

    case: str
    metric: str
    ratio: float


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of ``values`` lie, interpolated between neighbours.

    Raises ValueError for no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> Spread:
    """Return the least, the median and the greatest of ``values``, which is not empty."""
    return Spread(min(values), percentile(values, 0.5), max(values))


def figures(samples: Iterable[Sample], base: str) -> dict[tuple[str, str, str], Figure]:
    """Return the figure of every (case, metric, executor). Ratios pair the medians of one round: noise affects both."""
    rounds: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for sample in samples:
        if sample.values:
            of_key = rounds.setdefault((sample.case, sample.metric, sample.executor), {})
            of_key.setdefault(sample.round, []).extend(sample.values)
    return {key: _figure(own, rounds.get((key[0], key[1], base))) for key, own in rounds.items()}


def interval(values: Sequence[float], share: float = 0.95, resamples: int = 2000) -> Spread:
    """Return the median of ``values`` and the interval in which ``share`` of the medians of its resamples lie.

    A percentile bootstrap with a fixed seed: the same values give the same interval. Raises ValueError for no values.
    """
    draw = random.Random(0)
    medians = [percentile(draw.choices(values, k=len(values)), 0.5) for _ in range(resamples)]
    outside = (1 - share) / 2
    return Spread(percentile(medians, outside), percentile(values, 0.5), percentile(medians, 1 - outside))


def verdict(found: Spread, goal: float) -> str:
    """Return whether a ratio is at most ``goal``; "undecided" where its interval reaches to both sides."""
    if found.most <= goal:
        return "met"
    return "missed" if found.least > goal else "undecided"


def _figure(own: dict[int, list[float]], base: dict[int, list[float]] | None) -> Figure:
    values = [value for of_round in own.values() for value in of_round]
    ratios = tuple(
        percentile(own[each], 0.5) / divisor
        for each in own
        if base is not None and each in base and (divisor := percentile(base[each], 0.5)) > 0
    )
    least, median, most = spread(values)
    return Figure(median, percentile(values, 0.99), least, most, len(values), ratios)
