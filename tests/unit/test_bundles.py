"""Bundles of a placement group made by others: which an engine uses, and why it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cluster.bundles import check_bundles
from vllm_ray_ascend.errors import PlacementError

pytestmark = pytest.mark.unit

FOUR = [{"NPU": 1.0}] * 4
MIXED = [{"CPU": 1.0}, {"NPU": 1.0}, {"NPU": 1.0, "CPU": 1.0}, {"CPU": 4.0}]
MAKE = "`ray.util.placement_group([{'NPU': 1}] * 2)`"


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1]), ("", [0, 1]), ("2,3", [2, 3]), (" 3, 0 ", [3, 0])],
)
def test_the_named_or_the_first(indices: str | None, expected: list[int]) -> None:
    assert check_bundles(FOUR, [1.0] * 4, 2, indices) == expected


def test_bundles_without_npu_are_passed_over() -> None:
    assert check_bundles(MIXED, None, 2, None) == [1, 2]


def test_in_the_order_of_nodes_the_drivers_first() -> None:
    nodes = ["c", "b", "a", "b"]
    assert check_bundles(FOUR, None, 4, None, nodes=nodes, driver="b") == [1, 3, 2, 0]
    assert check_bundles(FOUR, None, 2, "0,2", nodes=nodes, driver="b") == [0, 2]


def test_two_engines_share_a_group_by_halves() -> None:
    assert check_bundles(FOUR, [0.0, 0.0, 1.0, 1.0], 2, "2,3") == [2, 3]


def test_fractions_of_an_npu() -> None:
    assert check_bundles(FOUR, [0.5, 0.5, 1.0, 1.0], 2, None, share=0.5) == [0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ("0;1", "VLLM_RAY_BUNDLE_INDICES=0;1 is no list of numbers: for instance VLLM_RAY_BUNDLE_INDICES=1,2"),
        ("1,2,", "VLLM_RAY_BUNDLE_INDICES=1,2, is no list of numbers: for instance VLLM_RAY_BUNDLE_INDICES=1,2"),
        ("1", "VLLM_RAY_BUNDLE_INDICES=1 names 1 bundle, the engine needs 2: for instance VLLM_RAY_BUNDLE_INDICES=1,2"),
        (
            "1,1",
            (
                "VLLM_RAY_BUNDLE_INDICES=1,1 names bundle 1 more than once, two workers cannot share it: "
                "for instance VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "1,4",
            (
                "VLLM_RAY_BUNDLE_INDICES=1,4 names bundle 4, the group has 0 to 3: "
                "for instance VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "-1,2",
            (
                "VLLM_RAY_BUNDLE_INDICES=-1,2 names bundle -1, the group has 0 to 3: "
                "for instance VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
        (
            "0,1",
            (
                "VLLM_RAY_BUNDLE_INDICES=0,1 names bundle 0 without NPU, with one are 1, 2: "
                "for instance VLLM_RAY_BUNDLE_INDICES=1,2"
            ),
        ),
    ],
)
def test_messages_of_the_list(indices: str, message: str) -> None:
    with pytest.raises(PlacementError) as raised:
        check_bundles(MIXED, None, 2, indices)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("specs", "share", "message"),
    [
        (
            [{"NPU": 1.0}, {"NPU": 2.0}],
            1.0,
            "Bundle 1 of the placement group holds 2 NPUs, vLLM wants one a bundle: make the group with " + MAKE,
        ),
        (
            [{"CPU": 1.0}, {"NPU": 1.0}, {"CPU": 1.0}],
            1.0,
            "The engine needs 2 bundles with an NPU, the placement group has 1 (in all 3 bundles): lower "
            "--tensor-parallel-size or --pipeline-parallel-size, or make the group with " + MAKE,
        ),
        (
            [{"NPU": 1.0}, {"NPU": 0.5}],
            1.0,
            (
                "Bundle 1 holds 0.5 NPU, a worker takes 1: make bundles of {'NPU': 1}, or let a worker take less with "
                "VLLM_RAY_PER_WORKER_GPUS=0.5"
            ),
        ),
    ],
)
def test_messages_of_the_group(specs: list[dict[str, float]], share: float, message: str) -> None:
    with pytest.raises(PlacementError) as raised:
        check_bundles(specs, None, 2, None, share)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("free", "indices", "message"),
    [
        (
            [0.0, 0.0, 1.0, 1.0],
            None,
            (
                "(bundle 0 has 0 NPU free, bundle 1 has 0 NPU free; a worker takes 1). Free are 2, 3; use such: "
                "VLLM_RAY_BUNDLE_INDICES=2,3"
            ),
        ),
        (
            [1.0, 0.5, 1.0, 1.0],
            "1,2",
            "(bundle 1 has 0.5 NPU free; a worker takes 1). Free are 0, 2, 3; use such: VLLM_RAY_BUNDLE_INDICES=0,2",
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
        check_bundles(FOUR, free, 2, indices)
    assert str(raised.value) == f"Bundles of the placement group are held by another engine {message}"


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
        chosen = check_bundles(specs, free, world_size, ",".join(map(str, named)) if named else None)
    except PlacementError as error:
        suggested = str(error).partition("use such: VLLM_RAY_BUNDLE_INDICES=")[2]
        assert not suggested or check_bundles(specs, free, world_size, suggested)
        return
    assert named is None or chosen == named
    assert len(set(chosen)) == world_size
    assert all(specs[index].get("NPU") and free[index] for index in chosen)
