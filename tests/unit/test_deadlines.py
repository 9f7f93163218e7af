"""Limits of a step and of a start: in which order they end, and which switch raises each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.executor.pairs import neighbours
from vllm_ray_ascend.lifecycle.deadlines import DEVICE, MODEL, WORKERS, start_limits, step_limits, switch_of
from vllm_ray_ascend.settings import VARIABLES, Settings

pytestmark = pytest.mark.unit


def test_vllms_default_gives_three_limits_in_order() -> None:
    assert step_limits(0, 300, {}) == (240, 204, "")


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_hccls_limit_is_below_ours_and_a_multiple_of_68(execute_s: int, hang_s: int) -> None:
    limits = step_limits(hang_s, execute_s, {})
    assert limits.hang_s == (hang_s or 0.8 * execute_s)
    if limits.hccl_s is None:
        assert limits.hang_s <= 69
    else:
        assert 0 < limits.hccl_s < limits.hang_s
        assert limits.hccl_s % 68 == 0
        assert limits.hccl_s + 68 >= limits.hang_s - 1


def test_the_users_own_limit_of_hccl_stays() -> None:
    assert step_limits(0, 300, {"HCCL_EXEC_TIMEOUT": "100"}) == (240, None, "")


def test_a_limit_of_hccl_that_is_too_long_is_told_with_what_mends_it() -> None:
    limits = step_limits(0, 300, {"HCCL_EXEC_TIMEOUT": "1836"})
    assert limits.hccl_s is None
    assert "HCCL_EXEC_TIMEOUT=1836 is not below the 240 s" in limits.note
    assert "Set HCCL_EXEC_TIMEOUT to 239 or less, or raise VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (now 300)" in limits.note


def test_every_part_of_a_start_has_a_limit_and_its_switch_exists() -> None:
    limits = start_limits(Settings(worker_limit_s=1, device_limit_s=2, load_limit_s=3))
    assert (limits[WORKERS], limits[DEVICE], limits[MODEL]) == (1, 2, 3)
    assert {switch_of(part) for part in (*limits, "graphs and warm-up")} <= set(VARIABLES)


@pytest.mark.parametrize(("size", "pairs"), [(1, []), (2, [(0, 1)]), (4, [(0, 1), (1, 2), (2, 3)])])
def test_pipeline_pairs_are_neighbours_in_one_order(size: int, pairs: list[tuple[int, int]]) -> None:
    assert neighbours(size) == pairs
