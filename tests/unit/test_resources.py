"""The check of a cluster's NPUs, on what `ray.nodes()` may say."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ray_ascend.cluster.resources import Node, check_npus, live_nodes
from vllm_ray_ascend.errors import ClusterResourceError

pytestmark = pytest.mark.unit

SIZES = {"--tensor-parallel-size": 2, "--pipeline-parallel-size": 2}


def row(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 4.0, **resources}}


def refusal(nodes: list[Node], visible: str | None = None) -> str:
    with pytest.raises(ClusterResourceError) as raised:
        check_npus(nodes, 4, SIZES, visible)
    return str(raised.value)


def test_live_nodes_leaves_out_the_dead_and_sorts() -> None:
    table = [row("10.0.0.2", NPU=2.0), row("10.0.0.3", alive=False, NPU=8.0), row("10.0.0.1", GPU=1.0)]
    assert live_nodes(table) == [Node("10.0.0.1", 0, 1), Node("10.0.0.2", 2, 0)]


def test_a_dead_node_may_lack_resources() -> None:
    assert live_nodes([{"NodeManagerAddress": "10.0.0.1", "Alive": False}]) == []


def test_enough_is_enough() -> None:
    check_npus([Node("10.0.0.1", 2, 0), Node("10.0.0.2", 2, 0)], 4, SIZES)


def test_too_few_names_the_need_each_node_and_both_remedies() -> None:
    message = refusal([Node("10.0.0.1", 2, 0), Node("10.0.0.2", 1, 0)])
    assert "needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2)" in message
    assert "has 3 (10.0.0.1: 2, 10.0.0.2: 1)" in message
    assert "ray start --address" in message and "VLLM_RAY_ASCEND_NPU_WAIT_S" in message


def test_gpus_instead_of_npus_names_num_gpus_and_the_command() -> None:
    message = refusal([Node("10.0.0.1", 0, 8)])
    assert "10.0.0.1 declares 8 GPU" in message and "--num-gpus" in message
    assert """ray start ... --resources='{"NPU": 8}'""" in message


def test_no_npu_anywhere_says_how_ray_finds_them() -> None:
    assert "set_env.sh" in refusal([Node("10.0.0.1", 0, 0)])


def test_no_live_node() -> None:
    assert "no live node" in refusal([])


def test_a_visible_list_is_named_as_a_suspect() -> None:
    assert "ASCEND_RT_VISIBLE_DEVICES=0,9 is set here" in refusal([Node("10.0.0.1", 1, 0)], "0,9")
    assert "ASCEND_RT_VISIBLE_DEVICES" not in refusal([Node("10.0.0.1", 1, 0)])
