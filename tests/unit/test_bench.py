"""What the benchmarks compute from what they measured, without measuring."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.machine import sessions_ignored
from benchmarks.measure import rotate_executors
from benchmarks.options import BASE, CASES, Options, goals, read_options
from benchmarks.phases import PHASES, phases
from benchmarks.report import duration, goals_table, markdown
from benchmarks.statistics import Sample, Spread, figures, percentile, spread

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([7.0], 0.99, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([0.0, 10.0], 0.99, 9.9),
        ([4.0, 5.0], 1, 5),
    ],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_spread() -> None:
    assert spread([3.0, 1.0, 5.0]) == Spread(1.0, 3.0, 5.0)


def test_ratios_pair_the_rounds() -> None:
    """The machine is three times as slow in round 1: the seconds show it, the ratios do not."""
    samples = [
        Sample("tp2", BASE, "token", 0, [1.0, 1.0]),
        Sample("tp2", "ours", "token", 0, [2.0, 2.0]),
        Sample("tp2", BASE, "token", 1, [3.0]),
        Sample("tp2", "ours", "token", 1, [6.0]),
        Sample("tp2", "ours", "token", 2, [100.0]),
    ]
    found = figures(samples, BASE)
    ours = found["tp2", "token", "ours"]
    assert ours.ratio == Spread(2.0, 2.0, 2.0)
    assert (ours.least, ours.median, ours.most, ours.size) == (2.0, 2.0 + 2.0, 100.0, 4)
    assert found["tp2", "token", BASE].ratio == Spread(1.0, 1.0, 1.0)


def test_what_the_base_has_not_has_no_ratio() -> None:
    samples = [Sample("tp2", "ours", "token", 0, [1.0]), Sample("pp2", BASE, "token", 0, [1.0])]
    assert figures(samples, BASE)["tp2", "token", "ours"].ratio is None
    assert figures([Sample("tp2", "ours", "death", 0, [])], BASE) == {}


def test_the_spread_of_a_ratio_is_an_interval_of_its_median() -> None:
    """One round of forty in which the machine did something else does not widen it."""
    samples = [Sample("tp2", BASE, "token", number, [1.0]) for number in range(40)]
    samples += [Sample("tp2", "ours", "token", number, [9.0 if number == 7 else 0.9]) for number in range(40)]
    assert figures(samples, BASE)["tp2", "token", "ours"].ratio == Spread(0.9, 0.9, 0.9)


def test_goals_that_were_measured_have_a_verdict() -> None:
    samples = [Sample("tp2", BASE, metric, 0, [1.0]) for metric in ("token, 1 in flight", "empty call")]
    samples += [Sample("tp2", "ours", "token, 1 in flight", 0, [0.9]), Sample("tp2", "ours", "empty call", 0, [1.1])]
    lines = goals_table(goals(Options(cases=("tp2",))), figures(samples, BASE))
    assert lines[-2:] == [
        "| tp2 | token, 1 in flight | 1.02 | **0.900** [0.900, 0.900] | met |",
        "| tp2 | empty call | 1.00 | **1.100** [1.100, 1.100] | missed |",
    ]
    assert goals_table(goals(Options(cases=("pp2",))), figures(samples, BASE)) == []


def test_turns_begin_with_each_and_visit_all() -> None:
    assert ["".join(rotate_executors("ABC", number)) for number in range(4)] == ["ABC", "BCA", "CAB", "ABC"]


DRIVER = {
    "begin": 10.0,
    "executor begins": 12.0,
    "executor ends": 20.0,
    "kv cache": 21.0,
    "warm-up": 23.0,
    "engine": 24.0,
}


def test_phases_follow_the_slowest_worker_and_add_up() -> None:
    fast = {"process": 12.5, "import": 14.0, "device": 16.0, "load": 17.0}
    slow = {"process": 13.0, "import": 15.0, "device": 15.5, "load": 19.0}
    found = phases(DRIVER, [fast, slow])
    assert found == dict(zip(PHASES, (2, 1, 2, 1, 3, 1, 1, 2, 1), strict=True))
    assert tuple(found) == PHASES
    assert sum(found.values()) == DRIVER["engine"] - DRIVER["begin"]


def test_a_worker_process_older_than_its_executor() -> None:
    found = phases(DRIVER, [{"process": 9.0, "import": 14.0, "device": 15.0, "load": 16.0}])
    assert (found["launch"], found["import"]) == (0, 2)
    assert sum(found.values()) == 14


def test_phases_of_an_executor_without_an_engine() -> None:
    driver = {"begin": 10.0, "executor begins": 10.0, "executor ends": 20.0}
    found = phases(driver, [{"process": 11.0, "import": 14.0, "device": 15.0, "load": 16.0}])
    assert list(found) == ["driver", "launch", "import", "device", "load", "connect"]


def test_options() -> None:
    assert read_options([]) == Options()
    assert set(read_options([]).cases) <= set(CASES)
    given = read_options(["--cases", "pp2", "--executors", "ours", "mp", "--in-flight", "8", "--graphs"])
    assert given == dataclasses.replace(Options(), cases=("pp2",), executors=("ours", "mp"), in_flight=8, graphs=True)


def test_a_quick_run_is_smaller_and_can_be_changed() -> None:
    quick = read_options(["--quick", "--deaths", "3"])
    assert quick == dataclasses.replace(Options().quick(), deaths=3)
    assert quick.rounds < Options().rounds
    assert quick.name != Options().name


@pytest.mark.parametrize("arguments", [["--cases", "tp3"], ["--executors", "theirs"], ["--rounds", "-1"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(arguments)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (123.4, "123 s"), (0.0256, "25.6 ms"), (0.000214, "214 µs"), (1.0, "1 s"), (2e-6, "2 µs")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_shows_what_was_measured() -> None:
    samples = [
        Sample("tp2", BASE, "token", 0, [0.010]),
        Sample("tp2", "ours", "token", 0, [0.012]),
        Sample("tp2", "ours", "death to callback", 0, [0.05, 0.07]),
    ]
    run = {
        "machine": {"cores": 2, "processor": "p", "memory_gib": 23, "kernel": "6", "load_before": [0.5, 0, 0]},
        "versions": {"python": "3.11.7"},
        "commit": "abc",
        "began": "2026-11-21 12:00",
        "seconds": 60,
        "options": dataclasses.asdict(Options(cases=("tp2",), executors=(BASE, "ours"))),
    }
    text = markdown(run, figures(samples, BASE))
    assert "| token | 10 ms | 12 ms, **1.20** [1.20, 1.20] |" in text
    assert "| death to callback |  | 60 ms (69.8 ms) |" in text
    assert len(set(re.findall(r"^\|.*\|$", text, re.MULTILINE))) == 4


@pytest.mark.parametrize("before", ["1", "0"])
def test_the_kernels_sharing_among_sessions_is_off_while_a_benchmark_runs(tmp_path: Path, before: str) -> None:
    switch = tmp_path / "sched_autogroup_enabled"
    switch.write_text(before)
    with sessions_ignored(switch) as is_off:
        assert is_off and switch.read_text() == "0"
    assert switch.read_text() == before


def test_a_kernel_that_never_shares_among_sessions_needs_no_switch(tmp_path: Path) -> None:
    with sessions_ignored(tmp_path / "missing") as is_off:
        assert is_off
