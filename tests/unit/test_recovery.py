"""When workers are restarted, and what new ones are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.executor.pairs import connect_pairs
from vllm_ray_ascend.executor.recovery import Recovery, obstacle, refuse_unrecoverable

pytestmark = pytest.mark.unit


def test_calls_that_make_ready_are_kept_in_order_with_their_arguments() -> None:
    recovery = Recovery()
    for name, arguments in (
        ("get_kv_cache_spec", ()),
        ("execute_model", ("batch",)),
        ("initialize_from_config", ([1],)),
        ("compile_or_warm_up_model", ()),
        ("add_lora", ("adapter",)),
    ):
        recovery.note(name, arguments, {})
    assert [(call.method, call.args) for call in recovery.calls] == [
        ("get_kv_cache_spec", ()),
        ("initialize_from_config", ([1],)),
        ("compile_or_warm_up_model", ()),
    ]
    assert recovery.obstacle() == ""


def test_our_own_calls_are_made_by_every_start_anyway() -> None:
    recovery = Recovery()
    recovery.note(connect_pairs, (), {})
    assert recovery.calls == [] and recovery.obstacle() == ""


def test_workers_that_somebody_changed_are_not_replaced() -> None:
    recovery = Recovery()
    recovery.note("update_weights", (), {})
    recovery.note("sleep", (), {})
    assert "collective_rpc('update_weights') may have changed the workers" in recovery.obstacle()
    own = Recovery()
    own.note(test_workers_that_somebody_changed_are_not_replaced, (), {})
    assert "test_workers_that_somebody_changed" in own.obstacle()


@pytest.mark.parametrize(
    ("restarts", "refused"),
    [([], False), ([100.0, 300.0], False), ([0.0, 100.0, 300.0], True), ([-500.0, 1, 2], False)],
)
def test_a_cause_that_lasts_ends_the_engine(restarts: list[float], refused: bool) -> None:
    assert bool(obstacle("", restarts, now=400.0)) is refused


def config(dp: int = 1, moe: bool = False, connector: object = None, elastic: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=dp, enable_elastic_ep=elastic),
        model_config=SimpleNamespace(is_moe=moe),
        kv_transfer_config=connector,
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (config(dp=2, moe=True), "step together"),
        (config(connector=object()), "--kv-transfer-config"),
        (config(elastic=True), "--enable-elastic-ep"),
    ],
)
def test_what_cannot_go_on_is_refused_at_once(given: SimpleNamespace, why: str) -> None:
    with pytest.raises(SettingError, match=why):
        refuse_unrecoverable(given)


def test_others_may() -> None:
    refuse_unrecoverable(config(dp=2))
    refuse_unrecoverable(config(moe=True))
