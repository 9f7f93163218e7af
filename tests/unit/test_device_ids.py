"""The NPUs of a data parallel rank, over Ray and without it."""

from __future__ import annotations

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend import patches
from vllm_ray_ascend.engine import device_ids
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


def config(*, ray: bool, ids: list[int] | None = None, local: int = 2) -> Any:
    parallel = SimpleNamespace(
        use_ray=ray, assigned_physical_gpu_ids=ids, world_size=2, local_world_size=2, data_parallel_size_local=local
    )
    return SimpleNamespace(parallel_config=parallel)


def test_over_ray_nothing_is_assigned_however_short_the_list_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    given = config(ray=True)
    device_ids.set_assigned_physical_gpu_ids_for_dp_rank(given, 5)
    assert given.parallel_config.assigned_physical_gpu_ids is None


def test_device_ids_over_ray_are_rejected() -> None:
    with pytest.raises(DeviceMappingError) as raised:
        device_ids.set_assigned_physical_gpu_ids_for_dp_rank(config(ray=True, ids=[4, 5]), 0, [4, 5])
    assert str(raised.value) == (
        "VRA-302: --device-ids (NPUs 4,5) cannot choose NPUs over Ray, which assigns them itself. Leave --device-ids "
        "out, or give Ray the list on that node: `ray stop`, then `ASCEND_RT_VISIBLE_DEVICES=4,5 ray start ...`."
    )


@pytest.mark.parametrize(("rank", "expected"), [(0, [4, 5]), (1, [6, 7])])
def test_without_ray_each_rank_has_its_own(rank: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,5,6,7")
    given = config(ray=False)
    device_ids.set_assigned_physical_gpu_ids_for_dp_rank(given, rank)
    assert given.parallel_config.assigned_physical_gpu_ids == expected


def test_without_ray_a_list_that_was_cut_for_the_only_rank_here_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "6,7")
    given = config(ray=False, local=1)
    device_ids.set_assigned_physical_gpu_ids_for_dp_rank(given, 1)
    assert given.parallel_config.assigned_physical_gpu_ids == [6, 7]


def test_without_ray_a_list_too_short_for_two_ranks_is_no_list_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend gives both ranks the same two NPUs."""
    monkeypatch.setenv(VISIBLE, "6,7")
    with pytest.raises(DeviceMappingError, match="--data-parallel-size-local 1"):
        device_ids.set_assigned_physical_gpu_ids_for_dp_rank(config(ray=False), 1)


def test_vllm_0_23_isolates_nothing_over_ray() -> None:
    entered: list[int] = []

    @contextlib.contextmanager
    def own(_: Any, local_dp_rank: int) -> Any:
        entered.append(local_dp_rank)
        yield

    ours = device_ids.skip_isolation_over_ray(own)
    with ours(config(ray=True), 1):
        pass
    with ours(config(ray=False), 2):
        pass
    assert entered == [2]


def test_selecting_replaces_what_a_module_has_and_keeps_upstreams() -> None:
    module = ModuleType("vllm.v1.engine.core")
    own = module.get_physical_gpu_ids_for_local_dp_rank = lambda: None  # type: ignore[attr-defined]
    for _ in range(2):
        device_ids.replace_functions([module])
    assert module.get_physical_gpu_ids_for_local_dp_rank is device_ids.physical_ids_of_dp_rank
    assert patches.original("vllm.v1.engine.core.get_physical_gpu_ids_for_local_dp_rank", module) is own
    assert not hasattr(module, "set_device_control_env_var")
