"""The acceptance, whole, on two software NPUs: every step runs, and the report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo.train.recitation import DENSE
from tests.hardware.__main__ import ROOT
from tests.softnpu.processes import variables

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LIMIT_S = 1200


def test_the_acceptance_of_two_npus(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hardware", str(DENSE), "--tp", "2", "--out", str(tmp_path)],
        env=variables({"SOFTNPU_DEVICES": "2", "SOFTNPU_NODE": "acceptance", "RAY_ADDRESS": None}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = {step["name"]: step for step in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert {name: step["state"] for name, step in steps.items()} == {
        **dict.fromkeys(("device", "transport", "mp", "ray", "eager"), "passed"),
        "pipeline": "skipped",
    }
    assert steps["ray"]["figures"]["texts_as_mp"] and steps["ray"]["figures"]["tokens_per_s_over_mp"] > 0
    assert steps["transport"]["figures"]["computes_afterwards"]
    assert "TransferAbortedError" in steps["transport"]["figures"]["operation"]
    assert "| ray | TP 2 over Ray | passed |" in (tmp_path / "report.md").read_text()
