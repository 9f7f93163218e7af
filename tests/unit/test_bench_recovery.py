"""What is found about a data parallel rank that is killed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.recovery.clients import Answer
from benchmarks.recovery.figures import figures, longest_gap_s, markdown, problems

pytestmark = pytest.mark.unit
KILLED_AT, BACK_AT = 100.0, 120.0


def answers(*times: float, error: str = "") -> list[Answer]:
    return [Answer(each - 0.5, each, error) for each in times]


def loss(others: list[Answer], lost: list[Answer] | None = None) -> dict[str, Any]:
    name = {"process": "worker", "phase": "decode", "rank": 0}
    return {**name, **figures(KILLED_AT, 10.0, BACK_AT, lost or [], others)}


def steady(pause_s: float = 0.0) -> list[Answer]:
    return answers(*(t + (pause_s if t > KILLED_AT else 0) for t in range(90, 141)))


def test_a_gap_counts_from_the_start_and_to_the_end() -> None:
    assert longest_gap_s(answers(3, 4, 9), 0, 10) == 5
    assert longest_gap_s(answers(3, 4), 0, 10) == 6
    assert longest_gap_s([], 0, 10) == 10


def test_an_answer_with_an_error_ends_no_gap() -> None:
    assert longest_gap_s([*answers(1, 9), *answers(5, error="gone")], 1, 9) == 8


def test_a_rank_that_serves_on_has_no_problem() -> None:
    assert problems([loss(steady())], 1) == []


def test_a_pause_of_the_other_rank_is_a_problem() -> None:
    found = loss(steady(pause_s=1.5))
    assert found["gap_s"] == 2.5 and found["gap_before_s"] == 1
    assert len(problems([found], 1)) == 1


def test_a_failed_request_of_the_other_rank_is_a_problem() -> None:
    assert len(problems([loss([*steady(), *answers(130, error="lost")])], 1)) == 1


def test_what_failed_before_the_loss_is_not_its_effect() -> None:
    assert problems([loss([*answers(95, error="busy"), *steady()])], 1) == []


def test_a_run_that_ended_early_is_a_problem() -> None:
    assert problems([loss(steady())], 18) == ["1 of 18 losses, then the run ended"]


def test_only_requests_that_ran_at_the_loss_are_those_lost() -> None:
    ran = [Answer(99.0, 100.2, "lost"), Answer(99.5, 100.4, "lost")]
    before, after = Answer(98.0, 99.0, ""), Answer(100.5, 100.6, "down")
    found = loss(steady(), [before, *ran, after])
    assert (found["requests"], found["failed"]) == (2, 2)
    assert found["failed_after_s"] == pytest.approx(0.4)


def test_a_run_as_text() -> None:
    losses = [loss(steady()), loss(steady(1.5), [Answer(99.0, 100.2, "lost")])]
    run = {
        "date": "2026-01-01",
        "commit": "c",
        "machine": {"cores": 2},
        "losses": losses,
        "problems": problems(losses, 2),
    }
    text = markdown(run)
    assert "| worker | decode | 0 | 0 | 0 |  | 1.00 | 1.00 | 20.0 |" in text
    assert "| worker | decode | 0 | 1 | 1 | 0.20 | 2.50 | 1.00 | 20.0 |" in text
    assert "Wrong: worker, decode, rank 0: the other rank paused 2.50 s" in text
