"""Physical, visible and logical numbers, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.numbering import (
    physical_of_logical,
    physical_of_visible,
    visible_of_logical,
    visible_of_physical,
)
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

NPUS = st.lists(st.integers(0, 63), unique=True, min_size=1)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """The NPUs of a process, and those of them that its engine was assigned, in an order of their own."""
    usable = draw(NPUS)
    return usable, draw(st.lists(st.sampled_from(usable), unique=True, min_size=1))


@given(NPUS)
def test_visible_and_physical_are_inverse(usable: list[int]) -> None:
    for visible in range(len(usable)):
        assert visible_of_physical(usable, physical_of_visible(usable, visible)) == visible
    for physical in usable:
        assert physical_of_visible(usable, visible_of_physical(usable, physical)) == physical


@given(assignments())
def test_logical_numbers_lead_to_the_assigned_npus_in_order(drawn: tuple[list[int], list[int]]) -> None:
    usable, assigned = drawn
    visible = [visible_of_logical(assigned, usable, logical) for logical in range(len(assigned))]
    assert [physical_of_visible(usable, number) for number in visible] == assigned
    assert len(set(visible)) == len(assigned)


@given(NPUS, st.integers(-100, 100))
def test_a_number_outside_is_an_error_and_never_counts_from_the_end(npus: list[int], number: int) -> None:
    if not 0 <= number < len(npus):
        with pytest.raises(DeviceMappingError):
            physical_of_visible(npus, number)
        with pytest.raises(DeviceMappingError):
            physical_of_logical(npus, number)
    if number not in npus:
        with pytest.raises(DeviceMappingError):
            visible_of_physical(npus, number)


def test_the_errors() -> None:
    with pytest.raises(DeviceMappingError) as unseen:
        visible_of_physical([4, 5, 6, 7], 3)
    assert str(unseen.value) == (
        "Physical NPU 3 is not visible here: this process sees physical NPUs 4,5,6,7. On this node `ray stop`, then "
        "`ASCEND_RT_VISIBLE_DEVICES=3,4,5,6,7 ray start ...`, or unset ASCEND_RT_VISIBLE_DEVICES before `ray start`."
    )
    with pytest.raises(DeviceMappingError) as beyond:
        physical_of_visible([4, 5], 2)
    assert str(beyond.value) == (
        "Visible NPU 2 does not exist here: this process sees physical NPUs 4,5, numbered from 0 to 1. Use one of "
        "them, or on this node `ray stop`, name more NPUs in ASCEND_RT_VISIBLE_DEVICES, and `ray start ...`."
    )
    with pytest.raises(DeviceMappingError) as unassigned:
        physical_of_logical([], 0)
    assert str(unassigned.value) == (
        "Logical NPU 0 does not exist: this engine was assigned no NPU. Assign it more NPUs, or lower "
        "--tensor-parallel-size or --pipeline-parallel-size."
    )
