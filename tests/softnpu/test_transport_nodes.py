"""NPU tensors between the nodes of a cluster: namespaces of the kernel, with a network between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import manager, namespaces
from softnpu.cluster.plan import Cluster, Shape

NAME = f"transport-{os.getpid()}"
ROOT = Path(__file__).resolve().parents[2]
IN_FLIGHT, EXECUTIONS = 2, 120
"""Enough for messages to overtake each other: a raylet blocks where stages run ahead (accelerator_context._write)."""

pytestmark = pytest.mark.skipif(
    namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster, _ = manager.up(NAME, Shape(npus_per_node=2, cpus_per_node=1))
    yield cluster
    manager.down(NAME)


def test_values_cross_nodes(cluster: Cluster) -> None:
    done = subprocess.run(
        manager.node_command(cluster, 1, [sys.executable, "-m", "tests.softnpu.test_transport_nodes"]),
        env=manager.command_environment(cluster, 1, os.environ) | {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"},
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    print(done.stdout)


def main() -> None:
    """Run a driver on the head node: two stages of two ranks, placed so that each message crosses to the other node."""
    import ray
    from ray.dag import InputNode, MultiOutputNode
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tests.softnpu.stage import Stage, expected
    from vllm_ray_ascend import ray_transport

    ray_transport.register()
    ray.init(runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}})
    nodes = [node["NodeID"] for node in ray.nodes()]
    stage = ray.remote(resources={"NPU": 1}, num_cpus=0)(Stage)
    stages = [
        stage.options(scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[index], soft=False)).remote()
        for index in (0, 1, 1, 0)
    ]
    with InputNode() as given:
        first = [each.make.bind(given).with_tensor_transport("hccl") for each in stages[:2]]
        moved = [
            each.forward.bind(value).with_tensor_transport("hccl")
            for each, value in zip(stages[2:], first, strict=True)
        ]
        dag = MultiOutputNode(
            [each.digest_all.bind(value) for each, value in zip(stages[1::-1], moved[::-1], strict=True)]
        )
    graph = dag.experimental_compile(_max_inflight_executions=IN_FLIGHT)
    devices = [ray.get(stages[index].about.remote())["device"] for index in (1, 0)]
    in_flight: list[tuple[int, Any]] = []
    for seed in range(EXECUTIONS):
        in_flight.append((seed, graph.execute(seed)))
        while in_flight and (len(in_flight) == IN_FLIGHT or seed == EXECUTIONS - 1):
            oldest, references = in_flight.pop(0)
            for found, device in zip(ray.get(references, timeout=60), devices, strict=True):
                assert found == (oldest, expected(oldest, device)), found
    graph.teardown()
    with InputNode() as given:
        large = stages[1].total.bind(stages[0].ones.bind(given).with_tensor_transport("hccl"))
    graph = large.experimental_compile()
    assert ray.get(graph.execute(16 << 20), timeout=60) == float(16 << 20)
    graph.teardown()
    about = ray.get([each.about.remote() for each in stages])
    assert [each["copies"] for each in about] == [0] * 4
    print([each["device"] for each in about])


if __name__ == "__main__":
    main()
