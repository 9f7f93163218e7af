"""What is said of a start or a step that takes too long."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.executor.start import hung_text, late_text, spreads
from vllm_ray_ascend.lifecycle.deadlines import MODEL, WORKERS

pytestmark = pytest.mark.unit


def test_late_ranks_are_named_with_what_each_does_and_the_switch() -> None:
    text = late_text(MODEL, 60, [1], {0: "waiting for work, at a.py:1 f", 1: None})
    assert text.startswith("model: ranks [1] are not ready after 60 s.")
    assert "raise VLLM_RAY_ASCEND_LOAD_LIMIT_S (0: no limit)" in text
    assert text.endswith("\n  rank 0: waiting for work, at a.py:1 f\n  rank 1: does not answer")


def test_ranks_without_a_process_wait_for_ray() -> None:
    text = late_text(WORKERS, 300, [2, 3], {0: "starting"})
    assert "\n  ranks [2, 3]: no process yet. Ray starts it once its bundle is free" in text


def test_a_step_that_hangs_names_the_ranks_that_are_silent() -> None:
    text = hung_text("execute_model", 240, {0: "in execute_model for 240.0 s, at b.py:2 g", 1: None})
    assert "execute_model has not ended after 240 s. Ranks [1] do not answer: stopped, or stuck in native code." in text
    assert "VLLM_RAY_ASCEND_HANG_S" in text


def test_times_of_ranks_show_the_slowest() -> None:
    assert spreads({0: {"model": 1.0}, 3: {"model": 4.5}, 1: {"model": 2.0}}) == [
        "model 1.00 to 4.50 s (slowest: rank 3)"
    ]
