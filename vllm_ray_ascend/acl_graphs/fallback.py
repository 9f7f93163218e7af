"""What to capture after a failure: fewer sizes, then graphs of decode batches only, then no graphs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vllm_ray_ascend.acl_graphs.capture_errors import FailureKind

EAGER = "NONE"
_NEXT_MODE = {"FULL": "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE": "FULL_DECODE_ONLY"}
"""By the names of vLLM's CUDAGraphMode. PIECEWISE has no mode between: its model has no wrapper for whole graphs."""

_KEPT_SHARE = 0.9
"""Of what was captured, the part that is kept: streams are needed after the capture too."""


class CapturePlan(NamedTuple):
    """What is to be captured: vLLM's mode by name, and batch sizes in ascending order."""

    mode: str
    sizes: tuple[int, ...]


class CaptureFailure(NamedTuple):
    """How far a capture got: ``captured`` of ``planned`` graphs, largest first, then ``size`` failed."""

    kind: FailureKind
    captured: int
    planned: int
    size: int


def step_down(plan: CapturePlan, failure: CaptureFailure, requested: CapturePlan) -> CapturePlan:
    """Return the plan after ``plan`` failed. ``requested`` is the first plan: the next mode has all of its sizes."""
    fewer = _reduce_sizes(plan.sizes, failure)
    if fewer:
        return CapturePlan(plan.mode, fewer)
    mode = _NEXT_MODE.get(plan.mode, EAGER)
    return CapturePlan(mode, () if mode == EAGER else requested.sizes)


def select_evenly(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return ``count`` of the ascending ``sizes``, evenly from the smallest to the largest; of 1 the largest.

    A batch is padded to the next size, so the largest bounds what has a graph at all, and gaps cost padding.
    """
    if count <= 1:
        return tuple(sizes[-1:]) if count == 1 else ()
    count, last = min(count, len(sizes)), len(sizes) - 1
    return tuple(sizes[round(index * last / (count - 1))] for index in range(count)) if count > 1 else tuple(sizes)


def _reduce_sizes(sizes: tuple[int, ...], failure: CaptureFailure) -> tuple[int, ...]:
    """Return fewer of ``sizes``, or none where that cannot help."""
    if failure.captured:
        kept = math.ceil(_KEPT_SHARE * len(sizes) * failure.captured / failure.planned)
        return select_evenly(sizes, min(kept, len(sizes) - 1))
    if failure.kind == "memory":  # the largest alone is too large
        return tuple(size for size in sizes if size <= failure.size // 2)
    return ()
