"""ASCEND_RT_VISIBLE_DEVICES as CANN reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.visible import caution, complaint, entries, listed, parse, rejected

pytestmark = pytest.mark.unit

LISTS = st.lists(st.sampled_from(["0", "1", "2", "3", "7", "8", " 4 ", "05", "-1", "", " ", "a", "2x", "+1", "٣"])).map(
    ",".join
)
COUNTS = st.integers(0, 16)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, None), ("", None), ("  ", None), ("3", ["3"]), ("4, 5,7", ["4", "5", "7"])],
)
def test_entries(visible: str | None, expected: list[str] | None) -> None:
    assert entries(visible) == expected


@pytest.mark.parametrize(
    ("visible", "expected", "wrong"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7], None),
        ("", [], "names no NPU"),
        ("  ", [], "names no NPU"),
        ("0,1,2", [0, 1, 2], None),
        ("6,2,4", [6, 2, 4], None),
        (" 3 , 1 ", [3, 1], None),
        ("1,2,1,3", [1, 2], "names NPU 1 twice"),
        ("1,2,02,3", [1, 2], "names NPU 2 twice"),
        ("1,,3", [1], "has a blank where an NPU should be"),
        ("5,", [5], "has a blank where an NPU should be"),
        (",5", [], "names no NPU"),
        ("1,-2,3", [1], "names NPU '-2', which is not there"),
        ("1,x,3", [1], "names 'x', which is no number"),
        ("1,2x,3", [1], "names '2x', which is no number"),
        ("7,8,0", [7], "names NPU '8', which is not there"),
        ("-1", [], "names NPU '-1', which is not there"),
    ],
)
def test_a_list_on_a_node_of_eight(visible: str | None, expected: list[int], wrong: str | None) -> None:
    assert parse(visible, 8) == expected
    assert rejected(visible, 8) == wrong


@given(LISTS, COUNTS)
def test_what_is_usable_is_the_start_of_the_list(visible: str, count: int) -> None:
    usable = parse(visible, count)
    assert len(set(usable)) == len(usable)
    assert all(0 <= number < count for number in usable)
    named = entries(visible) or []
    assert usable == [int(entry) for entry in named[: len(usable)]]
    assert (rejected(visible, count) is None) == (bool(named) and len(usable) == len(named))


@given(COUNTS.flatmap(lambda count: st.tuples(st.permutations(range(count)), st.just(count), st.integers(0, count))))
def test_parse_reads_what_listed_writes(drawn: tuple[list[int], int, int]) -> None:
    order, count, length = drawn
    assert parse(listed(order[:length]), count) == order[:length]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, None),
        ("0,1,5", None),
        ("0,9", None),  # `rejected` tells of it
        ("0, 1", "has a space: CANN since 8.0 stops reading there"),
        (
            "3,1",
            "does not name its NPUs in ascending order, each once: CANN since 8.0 then lets the process see no NPU",
        ),
        (
            "0,1,1",
            "does not name its NPUs in ascending order, each once: CANN since 8.0 then lets the process see no NPU",
        ),
        ("1,9,0", None),
    ],
)
def test_caution(visible: str | None, expected: str | None) -> None:
    assert caution(visible, 8) == expected


@pytest.mark.parametrize(
    ("visible", "seen", "expected"),
    [
        (None, 0, None),
        ("0,1", 2, None),
        ("0,9", 1, "names NPU '9', which is not there: 1 of its 2 are usable"),
        ("9,0", 0, "names NPU '9', which is not there: 0 of its 2 are usable"),
        ("0,0", 1, "names an NPU twice"),
    ],
)
def test_complaint(visible: str | None, seen: int, expected: str | None) -> None:
    found = complaint(visible, seen)
    assert (found is None) if expected is None else (found is not None and expected in found)
