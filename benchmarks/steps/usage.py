"""What processes use for a step. Imports nothing heavy: the engine's process uses it before vLLM is imported."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

Usage = Mapping[str, float]
"""Seconds of CPU time, and how often a process gave up its core, by itself or not."""


def pin_to_core(number: int) -> None:
    """Run all threads of this process on one core: ``number`` counts the cores, and begins again after the last one.

    Else a step takes half or twice the time from round to round, by which two processes happen to share a core.
    """
    cores = range(os.cpu_count() or 1)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cores[number % len(cores)]})


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
