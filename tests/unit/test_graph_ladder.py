"""The steps down from a failed capture, and the estimate before it."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.graphs.budget import Load, assumed, fit, streams
from vllm_ray_ascend.graphs.ladder import EAGER, Failure, Plan, spread, step_down
from vllm_ray_ascend.graphs.reasons import Kind

pytestmark = pytest.mark.unit

MODES = ("FULL", "FULL_AND_PIECEWISE", "PIECEWISE", "FULL_DECODE_ONLY")
SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=60, unique=True).map(lambda sizes: tuple(sorted(sizes)))


def failed(kind: Kind, captured: int, planned: int, size: int = 8) -> Failure:
    return Failure(kind, captured, planned, size)


def test_fewer_sizes_first_as_many_as_were_captured() -> None:
    plan = Plan("FULL_DECODE_ONLY", (1, 2, 4, 8))
    assert step_down(plan, failed("streams", 2, 4, 2), plan) == Plan("FULL_DECODE_ONLY", (1, 8))
    assert step_down(plan, failed("other", 1, 4, 4), plan) == Plan("FULL_DECODE_ONLY", (8,))


def test_a_share_is_left_of_many() -> None:
    plan = Plan("FULL_DECODE_ONLY", tuple(range(1, 101)))
    assert len(step_down(plan, failed("streams", 50, 100), plan).sizes) == 45


def test_pieces_and_whole_graphs_of_a_size_go_together() -> None:
    plan = Plan("FULL_AND_PIECEWISE", (1, 2, 4, 8))
    assert step_down(plan, failed("streams", 4, 8), plan) == Plan("FULL_AND_PIECEWISE", (1, 8))


@pytest.mark.parametrize(
    ("mode", "below"),
    [
        ("FULL", "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"),
        ("PIECEWISE", EAGER),
        ("FULL_DECODE_ONLY", EAGER),
    ],
)
def test_another_mode_where_not_even_one_was_captured(mode: str, below: str) -> None:
    asked = Plan(mode, (1, 2, 4, 8))
    lower = step_down(Plan(mode, (8,)), failed("streams", 0, 1), asked)
    assert lower == Plan(below, () if below == EAGER else asked.sizes)


def test_a_largest_graph_that_is_too_large_is_left_out() -> None:
    plan = Plan("FULL_DECODE_ONLY", (1, 2, 4, 8, 16))
    assert step_down(plan, failed("memory", 0, 5, 16), plan).sizes == (1, 2, 4, 8)
    assert step_down(plan._replace(sizes=(1,)), failed("memory", 0, 1, 1), plan) == Plan(EAGER, ())


@given(st.sampled_from(MODES), SIZES, st.data())
def test_every_way_down_ends_without_graphs(mode: str, sizes: tuple[int, ...], data: st.DataObject) -> None:
    plan = asked = Plan(mode, sizes)
    for _ in range(2 * len(sizes) + 2):
        per_size = 2 if plan.mode == "FULL_AND_PIECEWISE" else 1
        total = per_size * len(plan.sizes)
        captured = data.draw(st.integers(0, total - 1))
        kind: Kind = data.draw(st.sampled_from(get_args(Kind)))
        lower = step_down(plan, failed(kind, captured, total, plan.sizes[-1]), asked)
        if lower.mode == plan.mode:
            assert set(lower.sizes) < set(plan.sizes)
        else:
            assert lower.sizes == (() if lower.mode == EAGER else asked.sizes)
        plan = lower
        if plan.mode == EAGER:
            return
    raise AssertionError(plan)


@given(SIZES, st.integers(0, 80))
def test_sizes_are_spread_over_all(sizes: tuple[int, ...], count: int) -> None:
    chosen = spread(sizes, count)
    assert len(chosen) == min(count, len(sizes))
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(sizes)
    if count:
        assert chosen[-1] == sizes[-1]
    if min(count, len(sizes)) > 1:
        assert chosen[0] == sizes[0]


def test_streams_of_a_capture() -> None:
    assert streams(Load(whole=4, in_pieces=0, layers=28, groups=0)) == 4
    assert streams(Load(whole=4, in_pieces=0, layers=28, groups=1)) == 12
    assert streams(Load(whole=4, in_pieces=0, layers=28, groups=1, on_vector_cores=True)) == 8
    assert streams(Load(whole=0, in_pieces=2, layers=28, groups=1)) == 2 * 29 * 3


def test_a_driver_that_does_not_tell() -> None:
    assert assumed(0) == 1800
    assert assumed(3) == 1680
    assert assumed(100) == 0


@given(SIZES, st.integers(1, 20), st.integers(-5, 500))
def test_what_fits_fits(sizes: tuple[int, ...], each: int, available: int) -> None:
    kept = fit(sizes, each * len(sizes), available)
    assert kept and set(kept) <= set(sizes)
    assert len(kept) * each <= available or len(kept) == 1
    assert kept == sizes or (len(kept) + 1) * each > available
