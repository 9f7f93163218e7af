"""Whole tensor parallel groups on a node: the placement against every other one that is possible."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ray_ascend.cluster.rank_placement import order_bundles, place_groups, straddling_groups

pytestmark = pytest.mark.unit

FREE = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(lambda counts: dict(zip("abcdef", counts, strict=False)))
"""Whole free NPUs of one to six nodes: empty ones, partly used ones, all sizes."""


def most_whole_groups(free: dict[str, int], size: int, groups: int) -> int:
    """Try every number of whole groups on each node."""
    reachable = {0}
    for count in free.values():
        reachable = {whole + here for whole in reachable for here in range(groups + 1) if here * size <= count}
    return max(whole for whole in reachable if whole <= groups)


def fewest_nodes(free: dict[str, int], size: int, groups: int, among: str = "") -> int | None:
    """Try every set of nodes, or every one with ``among``; None: the groups fit whole on none."""
    for number in range(1, len(free) + 1):
        for nodes in combinations(free, number):
            fits = sum(free[node] // size for node in nodes) >= groups and all(free[node] >= size for node in nodes)
            if fits and (not among or among in nodes):
                return number
    return None


@settings(max_examples=1500, deadline=None)
@given(FREE, st.integers(1, 5), st.integers(1, 6), st.sampled_from("abcdefz"))
def test_as_many_groups_as_possible_are_whole(free: dict[str, int], size: int, groups: int, driver: str) -> None:
    placed = place_groups(free, size, groups, driver)
    if sum(free.values()) < size * groups:
        assert placed == []
        return
    assert len(placed) == size * groups
    used = Counter(placed)
    assert all(used[node] <= free[node] for node in used), "a node has not so many"
    straddling = straddling_groups(placed, size)
    whole = most_whole_groups(free, size, groups)
    assert groups - len(straddling) == whole
    if straddling:
        assert all(ranks[0] % size == 0 and len(ranks) == size for ranks, _ in straddling)
        return
    fewest = fewest_nodes(free, size, groups)
    assert len(used) == fewest
    assert (driver in used) == (fewest_nodes(free, size, groups, among=driver) == fewest)
    if driver in used:
        assert placed[0] == driver, "the first ranks are the driver's neighbours"
    runs = [node for rank, node in enumerate(placed) if rank == 0 or placed[rank - 1] != node]
    assert len(runs) == len(used), "adjacent stages are on one node where they can be"


@settings(max_examples=500, deadline=None)
@given(FREE, st.integers(1, 5), st.integers(1, 6), st.sampled_from("abcdefz"), st.randoms())
def test_a_group_made_for_the_plan_is_ordered_as_well(
    free: dict[str, int], size: int, groups: int, driver: str, random: object
) -> None:
    """Bundles of a plan in any order: as many whole groups as the plan has. Every bundle is used once."""
    nodes = place_groups(free, size, groups, driver)
    random.shuffle(nodes)  # type: ignore[attr-defined]
    bundles = order_bundles(dict(enumerate(nodes)), size, groups, driver)
    assert sorted(bundles) == list(range(len(nodes)))
    ordered = [nodes[bundle] for bundle in bundles]
    assert len(straddling_groups(ordered, size)) == len(
        straddling_groups(place_groups(free, size, groups, driver), size)
    )


class CountedNode(str):
    """A node's name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedNode.compared += 1
        return str.__eq__(self, other)

    def __lt__(self, other: str) -> bool:
        CountedNode.compared += 1
        return str.__lt__(self, other)


@pytest.mark.parametrize(("npus", "size"), [(1, 1), (8, 8), (3, 4)])
def test_the_work_is_nearly_linear_in_the_number_of_nodes(npus: int, size: int) -> None:
    """One rank a node, one group a node, groups that straddle all nodes: a sort, and a few steps a node."""
    nodes = [CountedNode(f"node{number:03}") for number in range(256)]
    CountedNode.compared = 0
    placed = place_groups(dict.fromkeys(nodes, npus), size, npus * len(nodes) // size, nodes[0])
    assert len(placed) == npus * len(nodes)
    assert CountedNode.compared < 64 * len(nodes)


@pytest.mark.parametrize(
    ("free", "size", "groups", "driver", "expected"),
    [
        ({"a": 3, "b": 3}, 2, 2, "a", "aabb"),
        ({"a": 3, "b": 3}, 2, 2, "b", "bbaa"),
        ({"a": 1, "b": 4, "c": 2}, 2, 2, "a", "bbbb"),  # the driver's node has no room for a group
        ({"a": 2, "b": 8, "c": 4}, 2, 2, "a", "cccc"),  # one node; the larger one stays whole for others
        ({"a": 3, "b": 5, "c": 8}, 4, 3, "a", "ccccccccbbbb"),
        ({"a": 3, "b": 3, "c": 2}, 4, 2, "b", "bbbcaaac"),
        ({"a": 4, "b": 4}, 8, 1, "b", "bbbbaaaa"),  # larger than a node
        ({"a": 3, "b": 0}, 2, 2, "a", ""),
    ],
)
def test_examples(free: dict[str, int], size: int, groups: int, driver: str, expected: str) -> None:
    assert "".join(place_groups(free, size, groups, driver)) == expected


def test_bundles_of_a_group_that_is_larger_than_the_engine() -> None:
    nodes = {1: "b", 2: "a", 3: "c", 5: "b", 6: "c"}
    assert order_bundles(nodes, 2, 1, "a") == [1, 5], "not one on the driver's node and one on another"
    assert order_bundles(nodes, 2, 2, "c") == [3, 6, 1, 5]
    assert order_bundles(nodes, 2, 3, "c") == []


def test_groups_that_straddle_are_named() -> None:
    assert straddling_groups("aabb", 2) == []
    (group,) = straddling_groups("aaab", 2)
    assert str(group) == "ranks 2, 3 on a, b"
