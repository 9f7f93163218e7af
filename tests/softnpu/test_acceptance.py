"""The acceptance, whole, on four software NPUs: every step runs, and the report says so and hides what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.train.recitation import DENSE
from tests.hardware.__main__ import ROOT, plan
from tests.softnpu.processes import variables

pytestmark = pytest.mark.integration

LIMIT_S = 2400
STEPS = ("device", "abort", "destroy", "stop", "mp", "ray", "eager", "pipeline", "data")


def test_the_first_step_needs_pytest_alone(tmp_path: Path) -> None:
    """What an Atlas server has: vLLM's environment, and pytest."""
    for line in (ROOT / "requirements" / "test.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name not in ("pytest", "iniconfig", "pluggy"):
            (tmp_path / f"{name.replace('-', '_')}.py").write_text("raise ImportError('not on an Atlas server')")
    device = plan(str(DENSE), 1, 1, 1)[0]
    done = subprocess.run(
        [sys.executable, *device.command, "--collect-only", "-q"],
        env=variables({"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0 and "test_npu.py" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_acceptance_of_four_npus(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hardware", str(DENSE), "--tp", "2", "--out", str(tmp_path)],
        env=variables(
            {
                "SOFTNPU_DEVICES": "4",
                "SOFTNPU_NODE": "acceptance",
                "RAY_ADDRESS": "local",
                "HCCL_SOCKET_IFNAME": "lo",
                "VLLM_HOST_IP": "127.0.0.1",
                "VLLM_API_KEY": "opensesame",
            }
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = {step["name"]: step for step in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert {name: step["state"] for name, step in steps.items()} == dict.fromkeys(STEPS, "passed")
    for name in ("ray", "eager", "pipeline", "data"):
        assert steps[name]["figures"]["texts_as_mp"] and steps[name]["figures"]["tokens_per_s_over_mp"] > 0, name
    assert "TransferAbortedError" in steps["abort"]["figures"]["operation"]
    assert all(steps[name]["figures"]["computes_afterwards"] for name in ("abort", "destroy", "stop"))
    assert steps["destroy"]["figures"]["returned"] and steps["destroy"]["figures"]["event_before"] == "False"
    assert steps["stop"]["figures"]["computes_restarted"] == "16.0"
    for report in ("report.md", "report.json"):
        text = (tmp_path / report).read_text()
        assert "opensesame" not in text and "127.0.0.1" not in text and "HCCL_SOCKET_IFNAME" in text
    assert "| ray | TP 2 over Ray | passed |" in (tmp_path / "report.md").read_text()
