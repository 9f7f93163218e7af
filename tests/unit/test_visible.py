"""ASCEND_RT_VISIBLE_DEVICES as CANN reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.visible import complaint, entries, physical

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, None), ("", None), ("  ", None), ("3", ["3"]), ("4, 5,7", ["4", "5", "7"])],
)
def test_entries(visible: str | None, expected: list[str] | None) -> None:
    assert entries(visible) == expected


@given(st.lists(st.integers(0, 63), unique=True, min_size=1))
def test_physical_follows_the_list(numbers: list[int]) -> None:
    visible = ",".join(map(str, numbers))
    assert [physical(visible, index) for index in range(len(numbers))] == numbers
    with pytest.raises(IndexError):
        physical(visible, len(numbers))


def test_physical_without_a_list_is_the_index() -> None:
    assert physical(None, 5) == 5


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
