"""The soak's verdict on samples of resources."""

from __future__ import annotations

import pytest

from benchmarks.soak.figures import Sample, growths, markdown

pytestmark = pytest.mark.unit
STEADY = {"files": 90.0, "threads": 60.0, "shm_files": 9.0, "shm_mb": 40.0, "memory_mb": 900.0}


def samples(count: int, **slope: float) -> list[Sample]:
    return [{name: value + number * slope.get(name, 0.0) for name, value in STEADY.items()} for number in range(count)]


def failed(given: list[Sample]) -> list[str]:
    return [growth.resource for growth in growths(given) if not growth.passed]


def test_what_is_steady_passes() -> None:
    assert failed(samples(40)) == []


@pytest.mark.parametrize("resource", STEADY)
def test_what_grows_all_the_time_fails(resource: str) -> None:
    assert failed(samples(200, **{resource: 0.5})) == [resource]


def test_the_warm_up_does_not_count() -> None:
    warming = [{**STEADY, "memory_mb": 100.0 + 80 * number} for number in range(10)]
    assert failed(warming + samples(30)) == []


def test_a_run_as_text() -> None:
    run = {
        "date": "2026-01-01",
        "commit": "c",
        "machine": {"cores": 2},
        "clients": 8,
        "seconds": 1800,
        "slow_s": 30,
        "period_s": 120,
        "requests": {"completed": 5, "right": 4, "aborted": 2, "failed": 1, "longest_gap_s": 1.25},
        "growth": [{**growth._asdict(), "passed": growth.passed} for growth in growths(samples(40, files=1.0))],
        "leftovers": ["2 shm_files"],
    }
    text = markdown(run)
    assert "5 completed, of which 4 have the right text, 2 aborted by their client, 1 failed" in text
    assert "| files |" in text and "GROWS" in text and "2 shm_files" in text
