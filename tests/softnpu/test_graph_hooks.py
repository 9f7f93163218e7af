"""What the graphs room does around torch_npu and vllm-ascend, and that it is still needed: the same without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.softnpu.graphs_script import MARKER

pytestmark = pytest.mark.softnpu

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
ROOM_FOR_GRAPHS = 5
OF_TORCH = 34
"""Streams that torch_npu makes beforehand: two defaults and a pool of 32."""


def run(how: str, folder: Path) -> dict[str, Any]:
    faults = folder / "faults"
    faults.touch()
    variables = {
        "SOFTNPU_STREAMS": str(OF_TORCH + ROOM_FOR_GRAPHS),
        "SOFTNPU_FAULTS": f"@{faults}",
        "SOFTNPU_NODE": f"{os.environ['SOFTNPU_NODE']}-graphs-{how}",
        "SOFTNPU_WAIT_LIMIT": "5",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.softnpu.graphs_script", how],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and len(lines) == 1, (done.stdout + done.stderr)[-5000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix(MARKER))
    return result


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("hooked", tmp_path_factory.mktemp("hooked"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("bare", tmp_path_factory.mktemp("bare"))


def test_after_a_want_of_streams_graphs_are_captured_again(hooked: dict[str, Any]) -> None:
    seen = hooked["no_streams"]
    assert "207008" in seen["failure"]
    assert seen["graphs"] == ROOM_FOR_GRAPHS
    assert seen["left"] == {"mib": 0, "streams": 0}
    assert seen["free"] == [0, ROOM_FOR_GRAPHS]
    assert "already recording" in seen["same_pool"], "torch_npu mends this by now: no new pool is needed"
    assert seen["again"] == "" and seen["random"] == ""


def test_a_broken_capture_leaves_no_memory_behind(hooked: dict[str, Any]) -> None:
    seen = hooked["broken"]
    assert "507903" in seen["failure"] and "out of memory" in seen["memory"]
    assert seen["left"] == {"mib": 0, "streams": 0}
    assert seen["again"] == ""


def test_a_failed_update_leaves_no_stream_waiting(hooked: dict[str, Any]) -> None:
    assert hooked["update"] == {"good": [5.0] * 4, "failure": "no such factor", "synchronize": ""}


def test_a_capture_that_cannot_be_survived_is_known(hooked: dict[str, Any]) -> None:
    seen = hooked["lost"]
    assert seen["failure"] and (seen["worked"], seen["graphs"]) == (True, ROOM_FOR_GRAPHS // 2)
    assert seen["works"] is False, "torch_npu mends this by now: the steps down need not end here"


def test_without_the_hooks_each_of_these_goes_wrong(bare: dict[str, Any]) -> None:
    assert bare["broken"]["left"]["mib"] >= 64
    assert bare["update"]["failure"] == "no such factor"
    assert "a stream waits for was not written in time" in bare["update"]["synchronize"]
