"""Limits of a step and of a startup, and which switch raises each."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.control.timeouts import (
    DEVICE,
    MODEL,
    WORKERS,
    is_commit,
    limit_variable,
    startup_limits,
    step_limit_s,
)
from vllm_ray_ascend.executor.pipeline_warmup import adjacent_stages
from vllm_ray_ascend.settings import VARIABLES, WEEK_S, Settings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("hang_s", "execute_s", "limit_s"), [(0, 300, 240), (100, 300, 100), (0, 1000, 800), (0, 10**12, WEEK_S)]
)
def test_a_step_is_late_before_vllm_gives_up_or_when_the_user_says(
    hang_s: float, execute_s: float, limit_s: float
) -> None:
    assert step_limit_s(hang_s, execute_s) == limit_s


def test_every_phase_of_a_startup_has_a_limit_and_its_switch_exists() -> None:
    limits = startup_limits(Settings(worker_limit_s=1, device_limit_s=2, load_limit_s=3))
    assert (limits[WORKERS], limits[DEVICE], limits[MODEL]) == (1, 2, 3)
    assert {limit_variable(phase) for phase in (*limits, "graphs and warm-up")} <= set(VARIABLES)


@pytest.mark.parametrize(("size", "pairs"), [(1, []), (2, [(0, 1)]), (4, [(0, 1), (2, 3), (1, 2)])])
def test_pipeline_pairs_are_neighbours_in_one_order(size: int, pairs: list[tuple[int, int]]) -> None:
    assert adjacent_stages(size) == pairs


def test_only_the_switch_of_a_scaling_is_a_switch() -> None:
    assert is_commit("elastic_ep_execute", ("commit_scale_up", True))
    assert not is_commit("elastic_ep_execute", ("start_async", "prepare_reconfiguration"))
    assert not is_commit("execute_model", ("commit_scale_up",)) and not is_commit(print, ())
