"""Invalid configurations are rejected early, with values and remedy, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape
from softnpu.errors import ClusterError

from demo.train.recitation import DENSE
from tests.e2e.conftest import ROOT, run_on_head

# Asks the control store itself: the state API would need a dashboard.
NOTHING_LEFT = """
import json, ray
ray.init("auto", log_to_driver=False)
from ray._private import state
print("LEFT", json.dumps({
    "actors": [a["ActorClassName"] for a in state.actors().values() if a["State"] != "DEAD"],
    "groups": [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"],
    "free": ray.available_resources().get("NPU"), "all": ray.cluster_resources().get("NPU")}))
"""

START = """
import sys
from vllm import LLM
LLM(model={model!r}, dtype="float32", tensor_parallel_size={tp}, distributed_executor_backend="ray",
    enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=16 << 20)
"""


RAYS_OWN = ("TelemetryAgent", "_TelemetryAgent", "_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor")
"""Actors that Ray's libraries keep for the whole life of a cluster."""


def check_nothing_left(cluster: Cluster) -> None:
    done = run_on_head(cluster, "-c", NOTHING_LEFT)
    found = re.search(r"LEFT (.*)", done.stdout)
    assert found, done.stderr[-2000:]
    left = json.loads(found[1])
    left["actors"] = [name for name in left["actors"] if name not in RAYS_OWN]
    assert left["actors"] == [] and left["groups"] == [] and left["free"] == left["all"], left


def serve(**variables: str) -> subprocess.CompletedProcess[str]:
    """`make serve`, without its installation step."""
    environment = {**os.environ, "SERVE_ONCE": "1", **variables}
    command = [sys.executable, "-m", "demo.serve"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_more_npus_than_the_cluster_has(one_node: Cluster) -> None:
    done = run_on_head(one_node, "-c", START.format(model=str(DENSE), tp=8))
    assert done.returncode != 0
    address = one_node.nodes[0].address
    assert f"The engine needs 8 NPUs (--tensor-parallel-size 8), the Ray cluster has 4 ({address}: 4)." in done.stderr
    assert "add nodes (`ray start --address=HEAD:PORT`)" in done.stderr
    check_nothing_left(one_node)


def test_a_visible_list_with_a_device_that_is_not_there() -> None:
    """The raylet's list names NPU 9 of a node with 4: the worker that gets it reports which entry is wrong."""
    settings = {1: {"ASCEND_RT_VISIBLE_DEVICES": "0,9"}}
    with pytest.raises(ClusterError) as raised:
        manager.up("e2e-list", Shape(nodes=1, npus_per_node=4, kind=manager.choose_node_kind()[0]), settings=settings)
    assert "ASCEND_RT_VISIBLE_DEVICES=0,9 names '9', but node e2e-list-1 has devices 0 to 3" in str(raised.value)
    with pytest.raises(ClusterError, match="there is no cluster"):
        manager.find_cluster("e2e-list")


def test_a_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = serve(PORT=str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr and "PORT=" in done.stderr, done.stderr


def test_a_model_that_does_not_exist() -> None:
    done = serve(MODEL="/no/such/model")
    assert done.returncode == 2
    assert "/no/such/model" in done.stderr and "MODEL=" in done.stderr, done.stderr


def test_no_compiler(tmp_path: Path) -> None:
    """Before anything is compiled: an empty cache, and no compiler by that name."""
    done = serve(CXX="no-such-compiler", SOFTNPU_CACHE=str(tmp_path), PORT="18765")
    assert done.returncode == 2
    assert "'no-such-compiler' is not on PATH" in done.stderr and "apt-get install g++" in done.stderr, done.stderr
    with pytest.raises(ClusterError, match="there is no cluster"):
        manager.find_cluster("default")


def test_ray_missing() -> None:
    """A Ray that cannot be found: as in an environment without it."""
    code = "import sys; sys.modules['ray'] = None; from demo.serve import main; sys.exit(main())"
    environment = {**os.environ, "SERVE_ONCE": "1", "PORT": "18766"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "ray" in done.stderr.lower() and "install" in done.stderr, done.stderr
