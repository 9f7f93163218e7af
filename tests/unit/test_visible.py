"""ASCEND_RT_VISIBLE_DEVICES as CANN reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.visible import (
    format_ids,
    invalid_entry,
    split_entries,
    usable_physical_ids,
    visibility_error,
    warning_for,
)

pytestmark = pytest.mark.unit

LISTS = st.lists(st.sampled_from(["0", "1", "2", "3", "7", "8", " 4 ", "05", "-1", "", " ", "a", "2x", "+1", "٣"])).map(
    ",".join
)
COUNTS = st.integers(0, 16)


@pytest.mark.parametrize(
    ("visible_devices", "expected"),
    [(None, None), ("", None), ("  ", None), ("3", ["3"]), ("4, 5,7", ["4", "5", "7"])],
)
def test_split_entries(visible_devices: str | None, expected: list[str] | None) -> None:
    assert split_entries(visible_devices) == expected


@pytest.mark.parametrize(
    ("visible_devices", "expected", "wrong"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7], None),
        ("", [], "names no NPU"),
        ("  ", [], "names no NPU"),
        ("0,1,2", [0, 1, 2], None),
        ("6,2,4", [6, 2, 4], None),
        (" 3 , 1 ", [3, 1], None),
        ("1,2,1,3", [1, 2], "names NPU 1 twice"),
        ("1,2,02,3", [1, 2], "names NPU 2 twice"),
        ("1,,3", [1], "has an empty entry"),
        ("5,", [5], "has an empty entry"),
        (",5", [], "names no NPU"),
        ("1,-2,3", [1], "names NPU '-2', which does not exist"),
        ("1,x,3", [1], "names 'x', which is not a number"),
        ("1,2x,3", [1], "names '2x', which is not a number"),
        ("7,8,0", [7], "names NPU '8', which does not exist"),
        ("-1", [], "names NPU '-1', which does not exist"),
    ],
)
def test_a_list_on_a_node_of_eight(visible_devices: str | None, expected: list[int], wrong: str | None) -> None:
    assert usable_physical_ids(visible_devices, 8) == expected
    assert invalid_entry(visible_devices, 8) == wrong


@given(LISTS, COUNTS)
def test_what_is_usable_is_the_start_of_the_list(visible_devices: str, npu_count: int) -> None:
    usable = usable_physical_ids(visible_devices, npu_count)
    assert len(set(usable)) == len(usable)
    assert all(0 <= number < npu_count for number in usable)
    named = split_entries(visible_devices) or []
    assert usable == [int(entry) for entry in named[: len(usable)]]
    assert (invalid_entry(visible_devices, npu_count) is None) == (bool(named) and len(usable) == len(named))


@given(
    COUNTS.flatmap(
        lambda npu_count: st.tuples(st.permutations(range(npu_count)), st.just(npu_count), st.integers(0, npu_count))
    )
)
def test_usable_physical_ids_reads_what_format_ids_writes(drawn: tuple[list[int], int, int]) -> None:
    order, npu_count, length = drawn
    assert usable_physical_ids(format_ids(order[:length]), npu_count) == order[:length]


@pytest.mark.parametrize(
    ("visible_devices", "expected"),
    [
        (None, None),
        ("0,1,5", None),
        ("0,9", None),  # `invalid_entry` reports it
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
def test_warning_for(visible_devices: str | None, expected: str | None) -> None:
    assert warning_for(visible_devices, 8) == expected


@pytest.mark.parametrize(
    ("visible_devices", "visible_count", "expected"),
    [
        (None, 0, None),
        ("0,1", 2, None),
        ("0,9", 1, "names NPU '9', which does not exist: 1 of its 2 are usable"),
        ("9,0", 0, "names NPU '9', which does not exist: 0 of its 2 are usable"),
        ("0,0", 1, "names an NPU twice"),
    ],
)
def test_visibility_error(visible_devices: str | None, visible_count: int, expected: str | None) -> None:
    found = visibility_error(visible_devices, visible_count)
    assert (found is None) if expected is None else (found is not None and expected in found)
