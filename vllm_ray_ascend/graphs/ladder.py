"""The steps down from a capture that failed: fewer sizes, then graphs of decode batches only, then none. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vllm_ray_ascend.graphs.reasons import Kind

EAGER = "NONE"
_BELOW = {"FULL": "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE": "FULL_DECODE_ONLY"}
"""By the names of vLLM's CUDAGraphMode. PIECEWISE has no step between: its model has no wrapper for whole graphs."""

_SHARE = 0.9
"""Of what was captured, the part that is kept: streams are wanted after the capture too."""


class Plan(NamedTuple):
    """What is to be captured: vLLM's mode by name, and batch sizes in ascending order."""

    mode: str
    sizes: tuple[int, ...]


class Failure(NamedTuple):
    """How far a capture got: ``captured`` of ``planned`` graphs, largest first, then ``size`` failed."""

    kind: Kind
    captured: int
    planned: int
    size: int


def step_down(plan: Plan, failed: Failure, asked: Plan) -> Plan:
    """The plan after ``plan`` failed. ``asked`` is the first one: another mode begins with all of its sizes again."""
    fewer = _fewer(plan.sizes, failed)
    if fewer:
        return Plan(plan.mode, fewer)
    below = _BELOW.get(plan.mode, EAGER)
    return Plan(below, () if below == EAGER else asked.sizes)


def spread(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of the ascending ``sizes``, evenly spread from the smallest to the largest; one alone is the largest.

    A batch is padded to the next size, so the largest bounds what has a graph at all, and gaps cost padding.
    """
    if count <= 1:
        return tuple(sizes[-1:]) if count == 1 else ()
    count, last = min(count, len(sizes)), len(sizes) - 1
    return tuple(sizes[round(index * last / (count - 1))] for index in range(count)) if count > 1 else tuple(sizes)


def _fewer(sizes: tuple[int, ...], failed: Failure) -> tuple[int, ...]:
    """Fewer of ``sizes``, or none where that cannot help."""
    if failed.captured:
        kept = math.ceil(_SHARE * len(sizes) * failed.captured / failed.planned)
        return spread(sizes, min(kept, len(sizes) - 1))
    if failed.kind == "memory":  # the largest alone is too large
        return tuple(size for size in sizes if size <= failed.size // 2)
    return ()
