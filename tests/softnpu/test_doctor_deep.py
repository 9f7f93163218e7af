"""`vllm-ray-ascend doctor --deep`: HCCL between two nodes of software NPUs, on NPUs that Ray has free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from softnpu.cluster import manager, namespaces
from softnpu.cluster.plan import Cluster, Shape

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]

LIMIT_S = 300
COMMAND = str(Path(sys.executable).with_name("vllm-ray-ascend"))
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "doctor.schema.json"
HOLDER = """
import ray, sys
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False)
node = next(row["NodeID"] for row in ray.nodes() if row["NodeManagerAddress"] == sys.argv[1])
class Holder:
    def hold(self): pass
options = {"resources": {"NPU": 2}, "num_cpus": 0}
holder = ray.remote(Holder).options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **options)
holder = holder.remote()
ray.get(holder.hold.remote())
print(flush=True)
input()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made, _ = manager.up(f"deep-{os.getpid()}", Shape(nodes=2, npus_per_node=2, cpus_per_node=1))
    yield made
    manager.down(made.name)


def run_deep(cluster: Cluster) -> tuple[int, dict[str, Any]]:
    """Return exit code and report of the command, with no other check than one that this machine passes."""
    arguments = [COMMAND, "doctor", "--deep", "--json", "--checks", "plugin", "--timeout", "90"]
    done = subprocess.run(
        manager.node_command(cluster, 1, arguments),
        env=manager.command_environment(cluster, 1, os.environ),
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    return done.returncode, report


@contextmanager
def npus_in_use(cluster: Cluster, node: int) -> Iterator[None]:
    """Have an actor hold all NPUs of the node, by Ray."""
    command = manager.node_command(cluster, 1, [sys.executable, "-c", HOLDER, cluster.node(node).address])
    environment = manager.command_environment(cluster, 1, os.environ)
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait(LIMIT_S)


def test_hccl_between_the_nodes_is_measured(cluster: Cluster) -> None:
    code, report = run_deep(cluster)
    assert (code, report["findings"]) == (0, [])
    (link,) = report["links"]
    assert {link["first"], link["second"]} == {node.address for node in cluster.nodes}
    assert link["error"] == "" and min(link["connect_s"], link["all_reduce_s"], link["send_s"], link["receive_s"]) > 0


def test_npus_in_use_are_left_alone(cluster: Cluster) -> None:
    with npus_in_use(cluster, 2):
        code, report = run_deep(cluster)
    assert code == 3 and report["links"] == []
    assert [(each["code"], each["address"]) for each in report["findings"]] == [("VRA-692", cluster.node(2).address)]


def test_without_ray_it_is_refused() -> None:
    done = subprocess.run([COMMAND, "doctor", "--deep", "--local"], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 3 and "VRA-609" in done.stderr
