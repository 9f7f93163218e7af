"""The acceptance of a machine: what it plans, how it compares, and what its report says."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.hardware.__main__ import Outcome, Step, compare, counts, describe, placements, plan, redacted, run
from tests.hardware.questions import compute_afterwards

pytestmark = pytest.mark.unit


def engine(name: str, texts: list[str], *rates: float, state: str = "passed") -> Outcome:
    return Outcome(name, "", state, figures={"texts": texts, "tokens_per_s": list(rates)})


def test_steps_that_a_small_machine_cannot_run_say_why() -> None:
    steps = {step.name: step for step in plan("m", 4, npus_here=2, npus=6.0)}
    assert steps["device"].lacks == steps["abort"].lacks == steps["destroy"].lacks == steps["stop"].lacks == ""
    assert steps["ray"].lacks == steps["mp"].lacks == "needs 4 NPUs on this node, there are 2"
    assert steps["pipeline"].lacks == steps["data"].lacks == "needs 8 NPUs in the Ray cluster, there are 6"


def test_engines_differ_in_what_their_step_says() -> None:
    given = {
        step.name: json.loads(step.command[-1])["options"]
        for step in plan("m", 2, npus_here=2, npus=4.0)
        if step.command[1] == "tests.hardware.engine"
    }
    assert all(options["tensor_parallel_size"] == 2 for options in given.values())
    assert given["mp"]["distributed_executor_backend"] == "mp"
    assert {given[name]["distributed_executor_backend"] for name in ("ray", "eager", "pipeline", "data")} == {"ray"}
    assert given["eager"]["enforce_eager"] and given["pipeline"]["pipeline_parallel_size"] == 2
    assert given["data"]["data_parallel_size"] == 2 and given["data"]["data_parallel_backend"] == "ray"


def test_other_texts_fail_and_rates_are_ratios_to_mp() -> None:
    outcomes = [
        engine("mp", ["a"], 10.0, 20.0, 30.0),
        engine("ray", ["a"], 19.0, 22.0, 10.0),
        engine("eager", ["b"], 5.0),
        engine("pipeline", ["b"], 20.0),
        Outcome("device", "", "passed"),
    ]
    found = {each.name: each for each in compare(outcomes)}
    assert found["ray"].state == "passed" and found["ray"].figures["tokens_per_s_over_mp"] == 0.95
    assert found["eager"].state == "passed" and found["eager"].figures["texts_as_mp"] is False
    assert (found["pipeline"].state, found["pipeline"].why) == ("failed", "other texts than with mp")


def test_without_mp_nothing_is_compared() -> None:
    outcomes = [engine("mp", ["a"], 1.0, state="failed"), engine("ray", ["b"], 1.0)]
    assert compare(outcomes) == outcomes


def test_the_report_has_every_step_and_no_text_of_the_model() -> None:
    facts: dict[str, Any] = {"vllm": "0.30.0", "npus_here": 8, "variables": {"HCCL_IF_IP": "10.0.0.1"}}
    outcomes = [Outcome("mp", "TP 2", "failed", "exit code 1", 3.0, {"texts": ["secret"], "ready_s": 12.34567})]
    text = describe(facts, outcomes)
    assert "| mp | TP 2 | failed: exit code 1 | 3 | ready_s 12.35 |" in text
    assert "secret" not in text and "    HCCL_IF_IP=10.0.0.1" in text and "- npus_here: 8" in text


def test_addresses_the_machine_and_the_users_folder_are_hidden() -> None:
    host, home = socket.gethostname(), Path.home()
    text = f"10.0.0.1:6379 at {host}, [fe80::1], {home}/x, torch 2.10.0, 12:34:56, c10::Error"
    assert redacted({"a": [text, 3]}) == {
        "a": ["ADDRESS:6379 at HOST, [ADDRESS], ~/x, torch 2.10.0, 12:34:56, c10::Error", 3]
    }


def test_placements_are_said_without_addresses() -> None:
    ready = "INFO vllm-ray-ascend 0.1.0 ready: vLLM 0.30.0, Ray 2.60.0; 2 nodes, 2 NPUs; rank 0 -> 10.0.0.1 NPU 0, "
    found = placements(["other", f"{ready}rank 1 -> 10.0.0.2 NPU 5"])
    assert found == {"placement": ["2 nodes, 2 NPUs; rank 0 -> node A NPU 0, rank 1 -> node B NPU 5"]}
    assert placements(["nothing"]) == {}


def test_tests_that_were_skipped_are_counted() -> None:
    assert counts(["..s", "=== 6 passed, 1 skipped in 12.31s ==="]) == {"tests": "6 passed, 1 skipped"}


def test_a_failed_step_says_why(tmp_path: Path) -> None:
    code = "print('ENGINE {\"measured\": 1}'); raise SystemExit('the NPU is gone')"
    outcome = run(Step("x", "", ("-c", code)), tmp_path / "log")
    assert (outcome.state, outcome.why) == ("failed", "exit code 1; the NPU is gone")
    assert outcome.figures == {"measured": 1}


def test_an_npu_that_does_not_compute_in_time_is_a_finding() -> None:
    found = compute_afterwards(limit_s=0.5, code="import time; time.sleep(60)")
    assert found["computes_afterwards"] is False
    assert compute_afterwards(code="pass")["computes_afterwards"] is True
