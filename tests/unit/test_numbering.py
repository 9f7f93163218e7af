"""Physical ids, visible and logical indices, converted there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.numbering import (
    logical_to_physical,
    logical_to_visible,
    physical_to_visible,
    visible_to_physical,
)
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

NPUS = st.lists(st.integers(0, 63), unique=True, min_size=1)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """The NPUs of a process, and those of them that its engine was assigned, in an order of their own."""
    usable_ids = draw(NPUS)
    return usable_ids, draw(st.lists(st.sampled_from(usable_ids), unique=True, min_size=1))


@given(NPUS)
def test_visible_and_physical_are_inverse(usable_ids: list[int]) -> None:
    for visible_index in range(len(usable_ids)):
        assert physical_to_visible(usable_ids, visible_to_physical(usable_ids, visible_index)) == visible_index
    for physical_id in usable_ids:
        assert visible_to_physical(usable_ids, physical_to_visible(usable_ids, physical_id)) == physical_id


@given(assignments())
def test_logical_indices_map_to_the_assigned_npus_in_order(drawn: tuple[list[int], list[int]]) -> None:
    usable_ids, assigned_ids = drawn
    visible = [
        logical_to_visible(assigned_ids, usable_ids, logical_index) for logical_index in range(len(assigned_ids))
    ]
    assert [visible_to_physical(usable_ids, visible_index) for visible_index in visible] == assigned_ids
    assert len(set(visible)) == len(assigned_ids)


@given(NPUS, st.integers(-100, 100))
def test_a_number_outside_is_an_error_and_never_counts_from_the_end(npus: list[int], number: int) -> None:
    if not 0 <= number < len(npus):
        with pytest.raises(DeviceMappingError):
            visible_to_physical(npus, number)
        with pytest.raises(DeviceMappingError):
            logical_to_physical(npus, number)
    if number not in npus:
        with pytest.raises(DeviceMappingError):
            physical_to_visible(npus, number)


def test_the_errors() -> None:
    with pytest.raises(DeviceMappingError) as unseen:
        physical_to_visible([4, 5, 6, 7], 3)
    assert str(unseen.value) == (
        "VRA-245: Physical NPU 3 is not visible here: this process sees physical NPUs 4,5,6,7. On this node `ray "
        "stop`, then `ASCEND_RT_VISIBLE_DEVICES=3,4,5,6,7 ray start ...`, or unset ASCEND_RT_VISIBLE_DEVICES before "
        "`ray start`."
    )
    with pytest.raises(DeviceMappingError) as beyond:
        visible_to_physical([4, 5], 2)
    assert str(beyond.value) == (
        "VRA-246: Visible NPU 2 does not exist here: this process sees physical NPUs 4,5, numbered from 0 to 1. Use "
        "one of them, or on this node `ray stop`, name more NPUs in ASCEND_RT_VISIBLE_DEVICES, and `ray start ...`."
    )
    with pytest.raises(DeviceMappingError) as unassigned:
        logical_to_physical([], 0)
    assert str(unassigned.value) == (
        "VRA-247: Logical NPU 0 does not exist: this engine was assigned no NPU. Assign it more NPUs, or lower "
        "--tensor-parallel-size or --pipeline-parallel-size."
    )
