"""NPU tensors in Ray's compiled graphs: real actors of one node, the real torch_npu, software NPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.dag import InputNode, MultiOutputNode

from tests.softnpu.stage import Stage
from vllm_ray_ascend import transport

LIMIT = 60


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    transport.register()
    variables = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1", "VLLM_RAY_ASCEND_TRANSFER_LIMIT_S": "20"}
    ray.init(num_cpus=8, resources={"NPU": 4}, runtime_env={"env_vars": variables}, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def stages() -> list[Any]:
    return [ray.remote(resources={"NPU": 1}, num_cpus=0)(Stage).remote() for _ in range(4)]


def test_a_tensor_goes_from_npu_to_npu(stages: list[Any]) -> None:
    with InputNode() as given:
        out = stages[0].make.bind(given).with_tensor_transport("hccl")
        dag = stages[1].see.bind(out)
    graph = dag.experimental_compile()
    for spec in ([("float32", (4, 5))], [("bfloat16", (1000,)), ("int64", (0,))]):
        print(ray.get(graph.execute(spec), timeout=LIMIT))
    graph.teardown()
