"""When workers are restarted, and which calls are repeated for the new ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ray_ascend.errors import HeadLostError, SettingError, WorkerDiedError
from vllm_ray_ascend.executor.pipeline_warmup import connect_pipeline_pairs
from vllm_ray_ascend.executor.recovery import Recovery, check_recoverable, restart_obstacle

pytestmark = pytest.mark.unit
DIED = WorkerDiedError("VRA-1", "died")


def test_readiness_calls_are_recorded_in_order_with_their_arguments() -> None:
    recovery = Recovery()
    for name, arguments in (
        ("get_kv_cache_spec", ()),
        ("execute_model", ("batch",)),
        ("initialize_from_config", ([1],)),
        ("compile_or_warm_up_model", ()),
        ("add_lora", ("adapter",)),
    ):
        recovery.record_call(name, arguments, {})
    assert [(call.method, call.args) for call in recovery.calls] == [
        ("get_kv_cache_spec", ()),
        ("initialize_from_config", ([1],)),
        ("compile_or_warm_up_model", ()),
    ]
    assert recovery.restart_obstacle(DIED) == ""


def test_our_own_calls_are_not_recorded() -> None:
    recovery = Recovery()
    recovery.record_call(connect_pipeline_pairs, (), {})
    assert recovery.calls == [] and recovery.restart_obstacle(DIED) == ""


def test_workers_changed_by_a_call_are_not_replaced() -> None:
    recovery = Recovery()
    recovery.record_call("update_weights", (), {})
    recovery.record_call("sleep", (), {})
    assert "collective_rpc('update_weights') may have changed the workers" in recovery.restart_obstacle(DIED)
    own = Recovery()
    own.record_call(test_workers_changed_by_a_call_are_not_replaced, (), {})
    assert "test_workers_changed_by_a_call" in own.restart_obstacle(DIED)


def test_without_ray_s_head_no_worker_is_started() -> None:
    gone = HeadLostError("VRA-1", "gone")
    assert restart_obstacle(gone, "", [], 0.0) == "Ray's head is gone, and without it no worker can be started."


@pytest.mark.parametrize(
    ("restarts", "refused"),
    [([], False), ([100.0, 300.0], False), ([0.0, 100.0, 300.0], True), ([-500.0, 1, 2], False)],
)
def test_a_cause_that_persists_ends_the_engine(restarts: list[float], refused: bool) -> None:
    assert bool(restart_obstacle(DIED, "", restarts, now=400.0)) is refused


def config(
    dp: int = 1,
    moe: bool = False,
    connector: object = None,
    elastic: bool = False,
    encoder: object = None,
    backend: str = "mp",
) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=dp, data_parallel_backend=backend, enable_elastic_ep=elastic
        ),
        model_config=SimpleNamespace(is_moe=moe),
        kv_transfer_config=connector,
        ec_transfer_config=encoder,
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (config(dp=2, moe=True), "step together"),
        (config(connector=object()), "--kv-transfer-config"),
        (config(encoder=object()), "--ec-transfer-config"),
    ],
)
def test_unsupported_configurations_are_rejected_at_once(given: SimpleNamespace, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        check_recoverable(given)


def test_other_configurations_are_accepted() -> None:
    check_recoverable(config(dp=2))
    check_recoverable(config(dp=2, moe=True, backend="ray"))
    check_recoverable(config(moe=True))
    check_recoverable(config(dp=2, moe=True, backend="ray", elastic=True))
