"""The benchmark of an engine's messages to many nodes: a small run of it, and its table."""

from __future__ import annotations

import pytest

from benchmarks.nodes.__main__ import WAYS, measure
from benchmarks.nodes.report import markdown

pytestmark = pytest.mark.unit

MACHINE = {"cores": 2, "processor": "EPYC", "memory_gib": 24, "kernel": "6", "load_before": [0.5, 0, 0]}


def test_a_small_run_has_every_figure_of_both_ways() -> None:
    turns = [
        {"round": 0, "nodes": 2, "ranks": 3, "way": way, "load": 1.0, **measure(2, 3, way, size=100, messages=3)}
        for way in WAYS
    ]
    assert [len(turn[figure]) for turn in turns for figure in ("cpu_s", "wall_s", "all_have_s")] == [3] * 6
    assert all(turn[figure][0] > 0 for turn in turns for figure in ("cpu_s", "wall_s", "all_have_s"))
    text = markdown({"commit": "c", "date": "d", "machine": MACHINE, "size": 100, "turns": turns})
    assert "| 2 x 3 | ranks |" in text and "| 2 x 3 | nodes |" in text
