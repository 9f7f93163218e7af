"""The fallback after a failed capture, and the estimate of a graph's streams."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.acl_graphs.capture import estimate_streams
from vllm_ray_ascend.acl_graphs.capture_errors import FailureKind
from vllm_ray_ascend.acl_graphs.fallback import EAGER, CaptureFailure, CapturePlan, select_evenly, step_down

pytestmark = pytest.mark.unit

MODES = ("FULL", "FULL_AND_PIECEWISE", "PIECEWISE", "FULL_DECODE_ONLY")
SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=60, unique=True).map(lambda sizes: tuple(sorted(sizes)))


def failure(kind: FailureKind, captured: int, planned: int, size: int = 8) -> CaptureFailure:
    return CaptureFailure(kind, captured, planned, size)


def test_the_first_step_keeps_as_many_sizes_as_were_captured() -> None:
    plan = CapturePlan("FULL_DECODE_ONLY", (1, 2, 4, 8))
    assert step_down(plan, failure("streams", 2, 4, 2), plan) == CapturePlan("FULL_DECODE_ONLY", (1, 8))
    assert step_down(plan, failure("other", 1, 4, 4), plan) == CapturePlan("FULL_DECODE_ONLY", (8,))


def test_a_tenth_of_many_captured_sizes_is_dropped() -> None:
    plan = CapturePlan("FULL_DECODE_ONLY", tuple(range(1, 101)))
    assert len(step_down(plan, failure("streams", 50, 100), plan).sizes) == 45


def test_piecewise_and_whole_graphs_of_a_size_are_kept_together() -> None:
    plan = CapturePlan("FULL_AND_PIECEWISE", (1, 2, 4, 8))
    assert step_down(plan, failure("streams", 4, 8), plan) == CapturePlan("FULL_AND_PIECEWISE", (1, 8))


@pytest.mark.parametrize(
    ("mode", "next_mode"),
    [
        ("FULL", "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"),
        ("PIECEWISE", EAGER),
        ("FULL_DECODE_ONLY", EAGER),
    ],
)
def test_the_next_mode_is_used_where_no_graph_was_captured(mode: str, next_mode: str) -> None:
    requested = CapturePlan(mode, (1, 2, 4, 8))
    lower = step_down(CapturePlan(mode, (8,)), failure("streams", 0, 1), requested)
    assert lower == CapturePlan(next_mode, () if next_mode == EAGER else requested.sizes)


def test_sizes_above_half_of_one_that_found_no_memory_are_dropped() -> None:
    plan = CapturePlan("FULL_DECODE_ONLY", (1, 2, 4, 8, 16))
    assert step_down(plan, failure("memory", 0, 5, 16), plan).sizes == (1, 2, 4, 8)
    assert step_down(plan._replace(sizes=(1,)), failure("memory", 0, 1, 1), plan) == CapturePlan(EAGER, ())


@given(st.sampled_from(MODES), SIZES, st.data())
def test_every_sequence_of_failures_ends_in_eager_mode(mode: str, sizes: tuple[int, ...], data: st.DataObject) -> None:
    plan = requested = CapturePlan(mode, sizes)
    for _ in range(2 * len(sizes) + 2):
        per_size = 2 if plan.mode == "FULL_AND_PIECEWISE" else 1
        total = per_size * len(plan.sizes)
        captured = data.draw(st.integers(0, total - 1))
        kind: FailureKind = data.draw(st.sampled_from(get_args(FailureKind)))
        lower = step_down(plan, failure(kind, captured, total, plan.sizes[-1]), requested)
        if lower.mode == plan.mode:
            assert set(lower.sizes) < set(plan.sizes)
        else:
            assert lower.sizes == (() if lower.mode == EAGER else requested.sizes)
        plan = lower
        if plan.mode == EAGER:
            return
    raise AssertionError(plan)


@given(SIZES, st.integers(0, 80))
def test_sizes_are_selected_evenly(sizes: tuple[int, ...], count: int) -> None:
    chosen = select_evenly(sizes, count)
    assert len(chosen) == min(count, len(sizes))
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(sizes)
    if count:
        assert chosen[-1] == sizes[-1]
    if min(count, len(sizes)) > 1:
        assert chosen[0] == sizes[0]


def test_streams_of_a_graph_are_estimated() -> None:
    assert estimate_streams("FULL", layers=28, communicators=0) == 1
    assert estimate_streams("FULL", layers=28, communicators=1) == 3
    assert estimate_streams("FULL", layers=28, communicators=1, on_vector_cores=True) == 2
    assert estimate_streams("PIECEWISE", layers=28, communicators=1) == 29 * 3
