"""The check of a cluster's NPUs, on what `ray.nodes()` may return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_ray_ascend.cluster.resources import (
    NodeResources,
    check_declared_npus,
    check_free_npus,
    drained_nodes,
    draining_notes,
    leaving_nodes,
    live_nodes,
    npu_holders,
    total_npus,
)
from vllm_ray_ascend.errors import ClusterResourceError

pytestmark = pytest.mark.unit

SIZES = {"--tensor-parallel-size": 2, "--pipeline-parallel-size": 2}


def row(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    node_id = f"id of {address}"
    return {"NodeID": node_id, "NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 4.0, **resources}}


def error_text(nodes: list[NodeResources], visible_devices: str | None = None) -> str:
    with pytest.raises(ClusterResourceError) as raised:
        check_declared_npus(nodes, 4, SIZES, visible_devices)
    return str(raised.value)


def test_live_nodes_leaves_out_the_dead_and_sorts() -> None:
    table = [row("10.0.0.2", NPU=2.0), row("10.0.0.3", alive=False, NPU=8.0), row("10.0.0.1", GPU=1.0)]
    available = {"id of 10.0.0.2": {"NPU": 0.5, "CPU": 4.0}, "id of 10.0.0.1": {"CPU": 4.0}}
    assert live_nodes(table, available) == [
        NodeResources("10.0.0.1", 0, 1, 0, "id of 10.0.0.1"),
        NodeResources("10.0.0.2", 2, 0, 0.5, "id of 10.0.0.2"),
    ]


def test_a_dead_node_may_lack_resources() -> None:
    assert live_nodes([{"NodeManagerAddress": "10.0.0.1", "Alive": False}]) == []


def test_nodes_that_drain_are_left_out_and_named() -> None:
    table = [
        row("10.0.0.1", NPU=2.0),
        row("10.0.0.2", NPU=2.0),
        {**row("10.0.0.3", alive=False), "DeathReason": 3, "DeathReasonMessage": "spot"},
        {**row("10.0.0.4", alive=False), "DeathReason": 2},  # it crashed
        {**row("10.0.0.1", alive=False), "DeathReason": 4},  # an earlier node of the same address
    ]
    available = {"id of 10.0.0.1": {"NPU": 2.0}, "id of 10.0.0.2": {"NPU": 2.0}}
    nodes = live_nodes(table, available, draining=draining_notes({"id of 10.0.0.2": 1_060_000}, now_s=1000))
    assert total_npus(nodes) == 2
    with pytest.raises(ClusterResourceError) as raised:
        check_declared_npus(nodes, 4, SIZES, leaving=leaving_nodes(nodes, drained_nodes(table)))
    assert str(raised.value) == (
        "VRA-258: The engine needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2), the Ray cluster has "
        "2 (10.0.0.1: 2, 10.0.0.2: 2 (draining, to be gone in 60 s)). On nodes that drain nothing new is placed: node "
        "10.0.0.2 is draining, to be gone in 60 s: its 2 are left out; node 10.0.0.3 was drained and is gone (spot). "
        "Add nodes (`ray start --address=HEAD:PORT`), or lower these sizes."
    )
    busy = [replace(nodes[0], free=0.0), nodes[1]]
    with pytest.raises(ClusterResourceError, match=r"10.0.0.1: 0 of 2, 10.0.0.2: 0 \(draining, .* s\) of 2\)"):
        check_free_npus(busy, 2, SIZES)


def test_a_drain_without_a_deadline() -> None:
    assert draining_notes({"a": 0}, now_s=1000) == {"a": "draining"}


def test_enough_is_enough() -> None:
    check_declared_npus([NodeResources("10.0.0.1", 2, 0), NodeResources("10.0.0.2", 2, 0)], 4, SIZES)


def test_too_few_names_the_need_each_node_and_both_remedies() -> None:
    message = error_text([NodeResources("10.0.0.1", 2, 0), NodeResources("10.0.0.2", 1, 0)])
    assert "needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2)" in message
    assert "has 3 (10.0.0.1: 2, 10.0.0.2: 1)" in message
    assert "ray start --address" in message and "VLLM_RAY_ASCEND_NPU_WAIT_S" in message


def test_nodes_with_gpus_are_not_asked_to_declare_npus() -> None:
    """They may have GPUs in truth. One that has NPUs is found by what the audit sees there."""
    message = error_text([NodeResources("10.0.0.1", 0, 8), NodeResources("10.0.0.2", 2, 0)])
    assert "VRA-243: " in message and "10.0.0.1: 0, 10.0.0.2: 2" in message
    assert "--num-gpus" not in message and "--resources" not in message


def test_no_npu_anywhere_explains_how_ray_finds_them() -> None:
    assert "set_env.sh" in error_text([NodeResources("10.0.0.1", 0, 0)])


def test_no_live_node() -> None:
    assert "no live node" in error_text([])


def test_a_visible_list_is_named_as_a_possible_cause() -> None:
    assert "ASCEND_RT_VISIBLE_DEVICES=0,9 is set here" in error_text([NodeResources("10.0.0.1", 1, 0)], "0,9")
    assert "ASCEND_RT_VISIBLE_DEVICES" not in error_text([NodeResources("10.0.0.1", 1, 0)])


def test_findings_of_undeclared_npus_replace_the_general_advice() -> None:
    with pytest.raises(ClusterResourceError) as raised:
        check_declared_npus(
            [NodeResources("10.0.0.1", 2, 0), NodeResources("10.0.0.2", 0, 8)],
            4,
            SIZES,
            None,
            ["VRA-202: node 10.0.0.2: what. fix it."],
        )
    assert str(raised.value) == (
        "VRA-239: The engine needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2), the Ray cluster has "
        "2 (10.0.0.1: 2, 10.0.0.2: 0).\nVRA-202: node 10.0.0.2: what. fix it."
    )


def group(state: str, name: str, *bundles: tuple[str, float]) -> dict[str, Any]:
    return {
        "placement_group_id": "1234",
        "name": name,
        "state": state,
        "bundles": {index: {"NPU": npus, "CPU": 1.0} for index, (_, npus) in enumerate(bundles)},
        "bundles_to_node_id": {index: node_id for index, (node_id, _) in enumerate(bundles)},
    }


NODES = [
    NodeResources("10.0.0.1", 2, 0, 0, "a"),
    NodeResources("10.0.0.2", 2, 0, 1, "b"),
    NodeResources("10.0.0.3", 0, 0, 0, "c"),
]


def test_enough_are_free() -> None:
    check_free_npus(NODES, 1, SIZES)


def test_holders_are_groups_that_were_granted_and_others() -> None:
    groups = [
        group("CREATED", "engine", ("a", 1.0), ("b", 1.0)),
        group("CREATED", "", ("a", 0.5)),
        group("PENDING", "waits", ("", 1.0)),
        group("REMOVED", "gone", ("a", 1.0)),
        group("CREATED", "on a dead node", ("d", 1.0)),
        group("CREATED", "of CPUs", ("a", 0.0)),
    ]
    assert npu_holders(groups, NODES) == [
        "placement group engine (1 on 10.0.0.1, 1 on 10.0.0.2)",
        "placement group 1234 (0.5 on 10.0.0.1)",
        "actors or tasks without a placement group (0.5 on 10.0.0.1)",
    ]
    assert npu_holders(groups[:1], [NodeResources("10.0.0.2", 2, 0, 1, "b")]) == [
        "placement group engine (1 on 10.0.0.2)"
    ]


def test_too_few_free_names_each_node_the_holders_and_the_remedies() -> None:
    with pytest.raises(ClusterResourceError) as raised:
        check_free_npus(NODES, 4, SIZES, ["placement group engine (2 on 10.0.0.1)", "actors"])
    assert str(raised.value) == (
        "VRA-244: The engine needs 4 NPUs (--tensor-parallel-size 2 x --pipeline-parallel-size 2), the Ray cluster has "
        "4, 1 of them free (10.0.0.1: 0 of 2, 10.0.0.2: 1 of 2). Held by placement group engine (2 on 10.0.0.1); "
        "actors. Stop what holds them, or lower these sizes; VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer for them."
    )


def test_shares_are_counted_where_a_worker_takes_part_of_an_npu() -> None:
    half_free = [NodeResources("10.0.0.1", 1, 0, 0.5, "a")]
    check_free_npus(half_free, 1, SIZES, share=0.5)
    check_free_npus([NodeResources("10.0.0.1", 1, 0, 0.3334, "a")], 1, SIZES, share=0.3333)
    with pytest.raises(ClusterResourceError) as raised:
        check_free_npus(
            [NodeResources("10.0.0.1", 1, 0, 0, "a")], 1, {"--tensor-parallel-size": 1}, ["A", "B"], share=0.5
        )
    assert str(raised.value) == (
        "VRA-350: The engine needs 1 x 0.5 NPU (--tensor-parallel-size 1, VLLM_RAY_PER_WORKER_GPUS=0.5), the Ray "
        "cluster has 1 NPU with room for 0 of these shares (free: 10.0.0.1: 0 of 1). Held by A; B. Stop one of them, "
        "or give every engine a smaller VLLM_RAY_PER_WORKER_GPUS; VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer for "
        "them."
    )


@pytest.mark.parametrize(
    ("npus", "free", "share", "workers"),
    [(1, 1, 0.5, 2), (2, 2, 0.6, 2), (2, 2, 1, 2), (1, 0.7, 0.5, 1), (1, 0.4, 0.5, 0), (1, 0.9999, 0.3333, 3)],
)
def test_workers_that_find_room(npus: float, free: float, share: float, workers: int) -> None:
    assert NodeResources("10.0.0.1", npus, 0, free).count_free(share) == workers
    assert NodeResources("10.0.0.1", npus, 0, free, draining="draining").count_free(share) == 0


def test_half_npus_do_not_suffice_for_a_worker() -> None:
    with pytest.raises(ClusterResourceError, match="0 of them free"):
        check_free_npus(
            [NodeResources("10.0.0.1", 1, 0, 0.5, "a"), NodeResources("10.0.0.2", 1, 0, 0.5, "b")], 1, SIZES
        )
