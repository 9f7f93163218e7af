"""The benchmark of large engines: a small run of it, and how it judges."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale.control import measure_control
from benchmarks.scale.plans import measure_plans
from benchmarks.scale.report import GOALS, METRICS, judge, markdown, plot

pytestmark = pytest.mark.unit


def test_a_small_run_has_every_figure(tmp_path: Path) -> None:
    point = {"ranks": 6, **measure_control(6, deaths=2), **measure_plans(6)}
    assert set(METRICS) | {goal.metric for goal in GOALS} <= set(point)
    assert (point["silent"], point["late_at_stop"], point["deaths"]) == (0, 0, 2)
    run = {
        "date": "2026-01-01",
        "commit": "c",
        "machine": {"cores": 2, "load_before": [1.0]},
        "load_after": 1.0,
        "points": [point],
        "goals": judge([point]),
    }
    assert "| death to notice (p99) |" in markdown(run)
    pytest.importorskip("matplotlib")
    plot(run, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "met"), [(4.9, True), (5.0, False)])
def test_a_goal_is_judged_at_its_number_of_ranks(seconds: float, met: bool) -> None:
    figures = dict.fromkeys((goal.metric for goal in GOALS), 0.0) | {"connect_with_sentinels": seconds}
    (goal, *_) = judge([{**figures, "ranks": 1024}, {**figures, "ranks": 1, "connect_with_sentinels": 99}])
    assert (goal["metric"], goal["found"], goal["met"]) == ("connect_with_sentinels", seconds, met)
