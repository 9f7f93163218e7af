"""Clusters with an autoscaler, of both versions, and without: Ray's own autoscaler with nodes that are raylets here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import namespaces

from tests.softnpu.processes import read_result

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("unshare", "--kill-child", "--net", "--pid", "--fork", "--mount-proc", "--mount")
PREPARE = (
    'ip link set lo up; mount -t tmpfs tmpfs /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray; exec "$@"'
)
LIMIT_S = 240

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]


def run_driver(tmp_path: Path, devices: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return what tests/softnpu/growing_cluster.py reports, and its log. All that it starts ends with it."""
    driver = str(Path(__file__).with_name("growing_cluster.py"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*NAMESPACES, "sh", "-c", PREPARE, "sh", sys.executable, driver, *arguments],
        env={
            **environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "RAY_AUTH_MODE": "disabled",
            "SOFTNPU_DEVICES": devices,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return read_result(done), done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1", "2"])
def test_nodes_are_added_for_what_does_not_fit(version: str, tmp_path: Path) -> None:
    """TP 2 x PP 2 on nodes of 3 of which none is there at first; then a node more for three NPUs at once."""
    found, log = run_driver(tmp_path, "0", "grows", version)
    assert found["autoscaler"].startswith(f"Ray's autoscaler, version {version}")
    assert f"version {version} (node types now: " in log
    assert "was asked for [{'NPU': 1.0} * 4] (PACK); waiting up to 1800 s" in log, "the demand, and where to see it"
    assert sorted(Counter(found["nodes"]).values()) == [2, 2], "pinned, as Ray packs three on one of the nodes"
    assert found["after"] == 3, "asked for as a whole, and not in parts"
    assert found["refusal"].startswith(f"VRA-259: Ray's autoscaler, version {version}")
    assert "[{'NPU': 1.0} * 100] (PACK), and has not added enough nodes within 4 s" in found["refusal"]
    assert found["groups"] == [], "no demand is left"


def test_a_cluster_without_an_autoscaler_is_asked_for_nothing(tmp_path: Path) -> None:
    found, _ = run_driver(tmp_path, "1", "stays")
    assert found["autoscaler"] == ""
    assert found["refusal"].startswith("VRA-243: The engine needs 4 NPUs")
    assert found["groups"] == []
