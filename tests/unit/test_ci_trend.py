"""Trend files: what is kept of a run, and what counts as worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import as_json
from benchmarks.statistics import Sample
from ci.trend import FEWEST, changes, main, of_benchmark, of_faults, report

pytestmark = pytest.mark.unit

DEATHS = {"mp": 2.0, "ours": 0.2}


def result(path: Path, ours: float) -> Path:
    samples = [
        {"case": "tp2", "executor": name, "metric": "start", "round": n, "values": [value * (n + 1)]}
        for name, value in (("mp", 2.0), ("ours", ours))
        for n in range(3)
    ]
    path.write_text(json.dumps({"machine": {"cores": 2, "processor": "x"}, "samples": samples}))
    return path


def test_ratios_of_a_benchmark_not_seconds(tmp_path: Path) -> None:
    run = json.loads(result(tmp_path / "nightly.json", 3.0).read_text())
    assert of_benchmark(run) == {"tp2, start, ours": 1.5}


def test_what_a_benchmark_of_this_repository_writes_is_read() -> None:
    samples = [Sample("tp2", name, "death to callback", n, [value]) for n in range(3) for name, value in DEATHS.items()]
    run = json.loads(as_json({"machine": {"cores": 2}}, samples))
    assert of_benchmark(run) == {"tp2, death to callback, ours": 0.1}


def test_seconds_of_faults() -> None:
    lines = [
        '{"case": "kill in decode", "reported": 0.2, "exited": 4.0, "clean": 0.1, "message": "VRA-311: rank 1 ..."}',
        "",
        '{"case": "kill in decode", "reported": 0.5, "exited": 3.0, "clean": 0.1, "message": ""}',
    ]
    assert of_faults(lines) == {
        "kill in decode, reported": 0.5,
        "kill in decode, exited": 4.0,
        "kill in decode, clean": 0.1,
    }


def test_a_regression_is_a_ratio_to_the_runs_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trend = tmp_path / "trends" / "performance.jsonl"
    path = tmp_path / "nightly.json"
    for _ in range(FEWEST):
        assert main([str(trend), str(result(path, 2.0)), "--fail"]) == 0
    assert "Nothing to compare with yet" in capsys.readouterr().out
    assert main([str(trend), str(result(path, 2.4)), "--fail"]) == 0
    assert "none more than 1.3 times as before; most tp2, start, ours: 1.20" in capsys.readouterr().out
    assert main([str(trend), str(result(path, 4.0)), "--fail", "--commit", "abc"]) == 1
    assert "| tp2, start, ours | 1 | 2 | **2.00** |" in capsys.readouterr().out
    last = json.loads(trend.read_text().splitlines()[-1])
    assert (last["commit"], last["metrics"]) == ("abc", {"tp2, start, ours": 2.0})
    assert main([str(trend), str(result(path, 4.0))]) == 0  # reported, not failed


def test_only_metrics_that_were_asked_for_count(tmp_path: Path) -> None:
    trend, path = tmp_path / "steps.jsonl", tmp_path / "quick.json"
    for ratio in (*[2.0] * FEWEST, 8.0):
        assert main([str(trend), str(result(path, ratio)), "--metric", "CPU", "--fail"]) == 0
    assert json.loads(trend.read_text().splitlines()[-1])["metrics"] == {}


def test_other_machines_and_runs_do_not_count() -> None:
    now = {"name": "nightly", "machine": "x", "metrics": {"a": 2.0, "new": 1.0}}
    same = {"name": "nightly", "machine": "x", "metrics": {"a": 1.0}}
    assert changes([same] * FEWEST, now) == [("a", 1.0, 2.0)]
    assert changes([{**same, "machine": "y"}] * FEWEST, now) == []
    assert changes([{**same, "name": "quick"}] * FEWEST, now) == []
    assert report([], 1.3).startswith("Nothing to compare")
