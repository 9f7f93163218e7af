"""NPU tensors between the nodes of a cluster: namespaces of the kernel, with a network between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ray_ascend.softnpu.cluster import manager, namespaces
from vllm_ray_ascend.softnpu.cluster.plan import Cluster, Shape

NAME = f"transport-{os.getpid()}"
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(namespaces.missing() is not None, reason=str(namespaces.missing()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made, _ = manager.up(NAME, Shape(npus_per_node=2, cpus_per_node=1))
    yield made
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
    """A driver on the head node: two stages of two ranks, dealt out so that each message crosses to the other node."""
    import ray
    from ray.dag import InputNode, MultiOutputNode
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tests.softnpu.stage import Stage, expected
    from vllm_ray_ascend import transport

    transport.register()
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
            each.on.bind(value).with_tensor_transport("hccl") for each, value in zip(stages[2:], first, strict=True)
        ]
        dag = MultiOutputNode([each.see.bind(value) for each, value in zip(stages[1::-1], moved[::-1], strict=True)])
    graph = dag.experimental_compile()
    for seed in range(8):
        told = ray.get(graph.execute(seed), timeout=60)
        for (number, found), index in zip(told, (1, 0), strict=True):
            device = ray.get(stages[index].about.remote())["device"]
            assert (number, found) == (seed, expected(seed, device)), (number, found)
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
