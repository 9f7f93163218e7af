"""Bundles of an existing placement group: which an engine uses, and why it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cluster.bundles import BundleOrder, bundle_share, check_worker_share, held_share, select_bundles
from vllm_ray_ascend.errors import PlacementError

pytestmark = pytest.mark.unit

FOUR = [{"NPU": 1.0}] * 4
MIXED = [{"CPU": 1.0}, {"NPU": 1.0}, {"NPU": 1.0, "CPU": 1.0}, {"CPU": 4.0}]
MAKE = "`ray.util.placement_group([{'NPU': 1}] * 2)`"


@pytest.mark.parametrize(
    ("specs", "share"),
    [
        ([{"NPU": 0.5, "CPU": 1.0}, {"CPU": 4.0}], 0.5),
        ([{"NPU": 0.25}] * 2, 0.25),
        ([{"NPU": 0.5}, {"NPU": 1.0}], None),
        (FOUR, None),
        ([{"NPU": 2.0}], None),
        ([{"GPU": 0.5}, {"CPU": 1.0}], None),
    ],
)
def test_a_part_of_an_npu_that_all_bundles_hold(specs: list[dict[str, float]], share: float | None) -> None:
    assert held_share(specs) == share


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1]), ("", [0, 1]), ("2,3", [2, 3]), (" 3, 0 ", [3, 0])],
)
def test_the_named_or_the_first(indices: str | None, expected: list[int]) -> None:
    assert select_bundles(FOUR, [1.0] * 4, 2, indices) == expected


def test_bundles_without_npu_are_passed_over() -> None:
    assert select_bundles(MIXED, None, 2, None) == [1, 2]


def test_in_the_order_of_nodes_the_drivers_first() -> None:
    nodes = ["c", "b", "a", "b"]
    assert select_bundles(FOUR, None, 4, None, order=BundleOrder(nodes, "b")) == [1, 3, 2, 0]
    assert select_bundles(FOUR, None, 2, "0,2", order=BundleOrder(nodes, "b")) == [0, 2]


def test_tensor_parallel_groups_are_whole_on_a_node_where_the_bundles_allow_it() -> None:
    order = BundleOrder(["a", "b", "b", "a", "a", "b"], "a", 2)
    six = [{"NPU": 1.0}] * 6
    assert select_bundles(six, None, 4, None, order=order) == [0, 3, 1, 2], "by node, and not the three of a first"
    assert select_bundles(six, None, 4, "2,1,4,0", order=order) == [2, 1, 4, 0], "what the user names, as it is"


def test_the_bundles_that_are_proposed_keep_groups_whole() -> None:
    order = BundleOrder(["a", "b", "a", "b"], "a", 2)
    with pytest.raises(PlacementError, match=r"VRA-226.*use these: VLLM_RAY_BUNDLE_INDICES=1,3"):
        select_bundles(FOUR, [0.0, 1.0, 1.0, 1.0], 2, "0,2", order=order)
    with pytest.raises(PlacementError, match=r"VRA-221.*for example VLLM_RAY_BUNDLE_INDICES=0,2"):
        select_bundles(FOUR, None, 2, "1", order=order)


def test_two_engines_share_a_group_by_halves() -> None:
    assert select_bundles(FOUR, [0.0, 0.0, 1.0, 1.0], 2, "2,3") == [2, 3]


def test_fractions_of_an_npu() -> None:
    assert select_bundles(FOUR, [0.5, 0.5, 1.0, 1.0], 2, None, share=0.5) == [0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (
            "0;1",
            "VRA-220: VLLM_RAY_BUNDLE_INDICES=0;1 is not a list of numbers: for example VLLM_RAY_BUNDLE_INDICES=1,2",
        ),
        (
            "1,2,",
            "VRA-220: VLLM_RAY_BUNDLE_INDICES=1,2, is not a list of numbers: for example VLLM_RAY_BUNDLE_INDICES=1,2",
        ),
        (
            "1",
            (
                "VRA-221: VLLM_RAY_BUNDLE_INDICES=1 names 1 bundle, the engine needs 2: for example "
                "VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "1,1",
            (
                "VRA-222: VLLM_RAY_BUNDLE_INDICES=1,1 names bundle 1 more than once, two workers cannot share it: "
                "for example VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "1,4",
            (
                "VRA-223: VLLM_RAY_BUNDLE_INDICES=1,4 names bundle 4, the group has 0 to 3: "
                "for example VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "-1,2",
            (
                "VRA-223: VLLM_RAY_BUNDLE_INDICES=-1,2 names bundle -1, the group has 0 to 3: "
                "for example VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "0,1",
            (
                "VRA-224: VLLM_RAY_BUNDLE_INDICES=0,1 names bundle 0 without NPU, with one are 1, 2: "
                "for example VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
    ],
)
def test_messages_of_the_list(indices: str, message: str) -> None:
    with pytest.raises(PlacementError) as raised:
        select_bundles(MIXED, None, 2, indices)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("specs", "share", "message"),
    [
        (
            [{"NPU": 1.0}, {"NPU": 2.0}],
            1.0,
            "VRA-218: Bundle 1 of the placement group holds 2 NPUs, vLLM needs one in each bundle: create the group "
            "with " + MAKE,
        ),
        (
            [{"CPU": 1.0}, {"NPU": 1.0}, {"CPU": 1.0}],
            1.0,
            "VRA-219: The engine needs 2 bundles with an NPU, the placement group has 1 (of 3 bundles in all): lower "
            "--tensor-parallel-size or --pipeline-parallel-size, or create the group with " + MAKE,
        ),
        (
            [{"NPU": 1.0}, {"NPU": 0.5}],
            1.0,
            (
                "VRA-225: Bundle 1 holds 0.5 NPU, a worker takes 1: create bundles of {'NPU': 1}, or let a worker take "
                "less with VLLM_RAY_PER_WORKER_GPUS=0.5"
            ),
        ),
    ],
)
def test_messages_of_the_group(specs: list[dict[str, float]], share: float, message: str) -> None:
    with pytest.raises(PlacementError) as raised:
        select_bundles(specs, None, 2, None, share)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("free", "indices", "message"),
    [
        (
            [0.0, 0.0, 1.0, 1.0],
            None,
            (
                "(bundle 0 has 0 NPU free, bundle 1 has 0 NPU free; a worker takes 1). Free are 2, 3; use these: "
                "VLLM_RAY_BUNDLE_INDICES=2,3"
            ),
        ),
        (
            [1.0, 0.5, 1.0, 1.0],
            "1,2",
            "(bundle 1 has 0.5 NPU free; a worker takes 1). Free are 0, 2, 3; use these: VLLM_RAY_BUNDLE_INDICES=0,2",
        ),
        (
            [0.0, 1.0, 0.0, 0.0],
            None,
            (
                "(bundle 0 has 0 NPU free; a worker takes 1). Free are 1; 2 are needed: stop the other engine, or make "
                "the placement group larger"
            ),
        ),
        (
            [0.0] * 4,
            "2,3",
            (
                "(bundle 2 has 0 NPU free, bundle 3 has 0 NPU free; a worker takes 1). Free are none; 2 are needed: "
                "stop the other engine, or make the placement group larger"
            ),
        ),
    ],
)
def test_messages_of_bundles_that_are_held(free: list[float], indices: str | None, message: str) -> None:
    with pytest.raises(PlacementError) as raised:
        select_bundles(FOUR, free, 2, indices)
    assert str(raised.value) == f"VRA-226: Bundles of the placement group are held by another engine {message}"


@given(
    st.lists(st.sampled_from([{"NPU": 1.0}, {"CPU": 1.0}]), max_size=8),
    st.integers(1, 4),
    st.data(),
)
def test_every_choice_is_distinct_free_and_has_an_npu(
    specs: list[dict[str, float]], world_size: int, data: st.DataObject
) -> None:
    free = [data.draw(st.sampled_from([0.0, 1.0])) for _ in specs]
    named: list[int] | None = data.draw(st.none() | st.lists(st.integers(-1, 9), min_size=1, max_size=4))
    try:
        chosen = select_bundles(specs, free, world_size, ",".join(map(str, named)) if named else None)
    except PlacementError as error:
        suggested = str(error).partition("use these: VLLM_RAY_BUNDLE_INDICES=")[2]
        assert not suggested or select_bundles(specs, free, world_size, suggested)
        return
    assert named is None or chosen == named
    assert len(set(chosen)) == world_size
    assert all(specs[index].get("NPU") and free[index] for index in chosen)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, 2.0, float("nan"), float("inf")])
def test_shares_that_no_worker_can_have(share: float) -> None:
    with pytest.raises(PlacementError, match=r"VRA-287: VLLM_RAY_PER_WORKER_GPUS=\S+ is not what a worker can have"):
        check_worker_share(share)
    check_worker_share(1.0)
    check_worker_share(0.0001)


@pytest.mark.parametrize(
    ("share", "world_size", "held"), [(0.5, 1, 0.5), (0.5, 2, 1), (1, 1, 1), (2, 1, 1), (0, 1, 1), (0.25, 8, 1)]
)
def test_only_an_engine_of_one_worker_asks_for_a_part_of_an_npu(share: float, world_size: int, held: float) -> None:
    assert bundle_share(share, world_size) == held
