"""`vllm-ray-ascend topology` names whoever has NPUs, also what is no engine of ours: in Ray Serve, in other jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from softnpu.cluster import namespaces

from tests.softnpu.processes import read_result
from tests.softnpu.test_growing_cluster import LIMIT_S, NAMESPACES, PREPARE, ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]


def test_the_owner_of_every_npu_is_named(tmp_path: Path) -> None:
    """Four of six NPUs are taken, on a node whose numbers begin with 2."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*NAMESPACES, "sh", "-c", PREPARE, "sh", sys.executable, str(Path(__file__).with_name("npu_users.py"))],
        env={
            **environment,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "RAY_AUTH_MODE": "disabled",
            "SOFTNPU_DEVICES": "8",
            "ASCEND_RT_VISIBLE_DEVICES": "2,3,4,5,6,7",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    found = read_result(done)
    (node,) = found["json"]["nodes"]
    lines = found["text"].splitlines()
    users = {(user["class"], user["name"]): user for user in node["users"]}
    worker = next(user for user in node["users"] if user["class"] == "Worker")
    assert (worker["pid"], worker["deployment"]) == (found["worker"], "Serve application chat, deployment Model")
    trainers = [users["Trainer", f"trainer-{number}"] for number in range(2)]
    assert {user["namespace"] for user in trainers} == {"training"} and trainers[0]["job"] != worker["job"]
    assert trainers[0]["physical"] == trainers[1]["physical"] and trainers[0]["amount"] == 0.5
    assert users["preprocess", ""]["amount"] == 1 and users["preprocess", ""]["physical"] == []
    assert [(each["name"], each["amount"]) for each in node["reservations"]] == [("later", 1)]
    assert (node["free"], node["unknown"]) == (2, 0)
    numbered = {f"NPU {number}": [line for line in lines if re.match(rf"  NPU {number} ", line)] for number in range(8)}
    assert [len(numbered[f"NPU {number}"]) for number in range(8)] == [0, 0, 1, 1, 1, 1, 1, 1]
    (of_worker,) = numbered[f"NPU {worker['physical'][0]}"]
    assert f"actor Worker of Serve application chat, deployment Model (pid {worker['pid']}, " in of_worker
    (of_trainers,) = numbered[f"NPU {trainers[0]['physical'][0]}"]
    assert "actor Trainer trainer-0 (pid" in of_trainers and " + actor Trainer trainer-1 (pid" in of_trainers
    assert any(line.startswith("  1 of the NPUs without an owner: held by task preprocess (pid ") for line in lines)
    assert any("  1 of the NPUs without an owner: reserved by placement group " in line for line in lines)
