"""The check of a cluster's NPUs, on what `ray.nodes()` may say."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ray_ascend.cluster.resources import Node, check_free, check_npus, holders, live_nodes
from vllm_ray_ascend.errors import ClusterResourceError

pytestmark = pytest.mark.unit

SIZES = {"--tensor-parallel-size": 2, "--pipeline-parallel-size": 2}


def row(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    node_id = f"id of {address}"
    return {"NodeID": node_id, "NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 4.0, **resources}}


def refusal(nodes: list[Node], visible: str | None = None) -> str:
    with pytest.raises(ClusterResourceError) as raised:
        check_npus(nodes, 4, SIZES, visible)
    return str(raised.value)


def test_live_nodes_leaves_out_the_dead_and_sorts() -> None:
    table = [row("10.0.0.2", NPU=2.0), row("10.0.0.3", alive=False, NPU=8.0), row("10.0.0.1", GPU=1.0)]
    available = {"id of 10.0.0.2": {"NPU": 0.5, "CPU": 4.0}, "id of 10.0.0.1": {"CPU": 4.0}}
    assert live_nodes(table, available) == [
        Node("10.0.0.1", 0, 1, 0, "id of 10.0.0.1"),
        Node("10.0.0.2", 2, 0, 0.5, "id of 10.0.0.2"),
    ]


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


def test_npus_that_ray_was_not_told_of_take_the_place_of_the_general_advice() -> None:
    with pytest.raises(ClusterResourceError) as raised:
        check_npus([Node("10.0.0.1", 2, 0), Node("10.0.0.2", 0, 8)], 4, SIZES, None, ["node 10.0.0.2: what. mend it."])
    assert str(raised.value) == (
        "The engine needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2), the Ray cluster has 2 "
        "(10.0.0.1: 2, 10.0.0.2: 0).\nnode 10.0.0.2: what. mend it."
    )


def group(state: str, name: str, *bundles: tuple[str, float]) -> dict[str, Any]:
    return {
        "placement_group_id": "1234",
        "name": name,
        "state": state,
        "bundles": {index: {"NPU": npus, "CPU": 1.0} for index, (_, npus) in enumerate(bundles)},
        "bundles_to_node_id": {index: node_id for index, (node_id, _) in enumerate(bundles)},
    }


NODES = [Node("10.0.0.1", 2, 0, 0, "a"), Node("10.0.0.2", 2, 0, 1, "b"), Node("10.0.0.3", 0, 0, 0, "c")]


def test_enough_are_free() -> None:
    check_free(NODES, 1, SIZES)


def test_holders_are_groups_that_were_granted_and_others() -> None:
    groups = [
        group("CREATED", "engine", ("a", 1.0), ("b", 1.0)),
        group("CREATED", "", ("a", 0.5)),
        group("PENDING", "waits", ("", 1.0)),
        group("REMOVED", "gone", ("a", 1.0)),
        group("CREATED", "on a dead node", ("d", 1.0)),
        group("CREATED", "of CPUs", ("a", 0.0)),
    ]
    assert holders(groups, NODES) == [
        "placement group engine (1 on 10.0.0.1, 1 on 10.0.0.2)",
        "placement group 1234 (0.5 on 10.0.0.1)",
        "actors or tasks without a placement group (0.5 on 10.0.0.1)",
    ]
    assert holders(groups[:1], [Node("10.0.0.2", 2, 0, 1, "b")]) == ["placement group engine (1 on 10.0.0.2)"]


def test_too_few_free_names_each_node_the_holders_and_the_remedies() -> None:
    with pytest.raises(ClusterResourceError) as raised:
        check_free(NODES, 4, SIZES, ["placement group engine (2 on 10.0.0.1)", "actors"])
    assert str(raised.value) == (
        "The engine needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2), the Ray cluster has 4, 1 of "
        "them free (10.0.0.1: 0 of 2, 10.0.0.2: 1 of 2). Held by placement group engine (2 on 10.0.0.1); actors. Stop "
        "what holds them, or lower these sizes; VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer for them."
    )


def test_half_npus_are_of_no_use_to_a_worker() -> None:
    with pytest.raises(ClusterResourceError, match="0 of them free"):
        check_free([Node("10.0.0.1", 1, 0, 0.5, "a"), Node("10.0.0.2", 1, 0, 0.5, "b")], 1, SIZES)
