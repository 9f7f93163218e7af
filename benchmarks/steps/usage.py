"""What processes use for a step. Imports nothing heavy: the engine's process uses it before vLLM is imported."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence

Usage = Mapping[str, float]
"""Seconds of CPU time, and how often a process gave up its core, by itself or not."""


def used_so_far() -> Usage:
    """Return what this process has used since it started."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": time.process_time(), "waits": used.ru_nvcsw, "preempted": used.ru_nivcsw}


def total(each: Sequence[Usage]) -> Usage:
    """Return what several processes have used together."""
    return {name: sum(one[name] for one in each) for name in each[0]}


def difference(before: Usage, after: Usage) -> Usage:
    """Return what was used between two points in time."""
    return {name: after[name] - before[name] for name in before}
