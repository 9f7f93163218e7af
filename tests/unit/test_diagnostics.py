"""Texts for a startup or a step that takes too long, and for a worker that died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ray_ascend.control.server import PeerLost
from vllm_ray_ascend.control.timeouts import MODEL, WORKERS
from vllm_ray_ascend.executor.diagnostics import hung_message, late_message, phase_ranges, worker_died_message

pytestmark = pytest.mark.unit


def test_late_ranks_are_named_with_what_each_does_and_the_switch() -> None:
    text = late_message(MODEL, 60, [1], {0: "waiting for work, at a.py:1 f", 1: None})
    assert text.startswith("model: ranks [1] are not ready after 60 s.")
    assert "raise VLLM_RAY_ASCEND_LOAD_LIMIT_S (0: no limit)" in text
    assert text.endswith("\n  rank 0: waiting for work, at a.py:1 f\n  rank 1: does not answer")


def test_ranks_without_a_process_wait_for_ray() -> None:
    text = late_message(WORKERS, 300, [2, 3], {0: "starting"})
    assert "\n  ranks [2, 3]: no process yet. Ray starts it once its bundle is free" in text


def test_a_step_that_hangs_names_the_ranks_that_are_silent() -> None:
    text = hung_message("execute_model", 240, {0: "in execute_model for 240.0 s, at b.py:2 g", 1: None})
    assert "execute_model has not ended after 240 s. Ranks [1] do not answer: stopped, or stuck in native code." in text
    assert "VLLM_RAY_ASCEND_HANG_S" in text


def test_a_death_that_only_ray_detects_names_rank_and_node() -> None:
    text = worker_died_message(PeerLost(3, 0, "node 10.0.0.2", ""))
    assert text.startswith("The worker process of rank 3 (node 10.0.0.2) died.") and "worker-*-*.err" in text


def test_a_death_names_the_file_with_the_last_output(tmp_path: Path) -> None:
    """Ray's session folder is where `ray start --temp-dir` put it: a worker knows by what its output goes to."""
    log = tmp_path / "logs" / "worker-1-2-3.err"
    log.parent.mkdir()
    code = "from vllm_ray_ascend.control.client import output_file; print(output_file())"
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True, check=True
        )
    assert done.stdout.strip() == str(log)
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout.strip() == ""
    text = worker_died_message(PeerLost(3, 7, "node 10.0.0.2", "", log=str(log)))
    assert f"Its last output is {log} on that node" in text and "session_latest" not in text


def test_times_of_ranks_show_the_slowest() -> None:
    assert phase_ranges({0: {"model": 1.0}, 3: {"model": 4.5}, 1: {"model": 2.0}}) == [
        "model 1.00 to 4.50 s (slowest: rank 3)"
    ]
