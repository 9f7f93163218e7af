"""The compiled graph's layout, the features that its executor rejects, its read backoff and flow control."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayChannelTimeoutError

from vllm_ray_ascend.compiled_graph.flow_control import AckRouter, AckTracker
from vllm_ray_ascend.compiled_graph.layout import create_layout
from vllm_ray_ascend.compiled_graph.read_backoff import next_pause_s, with_pauses
from vllm_ray_ascend.compiled_graph.validation import unsupported_features, validate
from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.settings import Settings

pytestmark = pytest.mark.unit

SETTINGS = Settings(executor="compiled_graph")


def config(**changes: Any) -> SimpleNamespace:
    """Return a VllmConfig of a plain engine with two stages, as far as read; ``changes``: by section, or whole."""
    parts: dict[str, Any] = {
        "parallel_config": {"pipeline_parallel_size": 2, "data_parallel_size": 1},
        "scheduler_config": {"async_scheduling": False},
        "model_config": {"is_moe": False},
    }
    whole: dict[str, Any] = {"kv_transfer_config": None, "ec_transfer_config": None}
    for name, value in changes.items():
        if name in parts:
            parts[name] |= value
        else:
            whole[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


@pytest.mark.parametrize(
    ("world_size", "stages", "expected", "pipelines"),
    [
        (1, 1, ((0,),), [(0,)]),
        (2, 1, ((0, 1),), [(0,), (1,)]),
        (2, 2, ((0,), (1,)), [(0, 1)]),
        (4, 2, ((0, 1), (2, 3)), [(0, 2), (1, 3)]),
        (6, 3, ((0, 1), (2, 3), (4, 5)), [(0, 2, 4), (1, 3, 5)]),
    ],
)
def test_stages_and_pipelines_are_vllms(
    world_size: int, stages: int, expected: tuple[tuple[int, ...], ...], pipelines: list[tuple[int, ...]]
) -> None:
    layout = create_layout(world_size, stages)
    assert layout.stages == expected
    assert layout.pipelines() == pipelines


def test_ranks_that_cannot_be_split_into_equal_stages_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 ranks cannot be split into 2 equal pipeline stages"):
        create_layout(5, 2)


def test_a_plain_engine_is_accepted() -> None:
    validate(config(), SETTINGS)
    validate(config(parallel_config={"data_parallel_size": 2}), SETTINGS)


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({}, Settings(recover="1"), "VLLM_RAY_ASCEND_RECOVER=1"),
        ({"scheduler_config": {"async_scheduling": True}}, SETTINGS, "--async-scheduling"),
        (
            {"parallel_config": {"data_parallel_size": 2}, "model_config": {"is_moe": True}},
            SETTINGS,
            "--data-parallel-size",
        ),
        ({"kv_transfer_config": object()}, SETTINGS, "--kv-transfer-config"),
        ({"ec_transfer_config": object()}, SETTINGS, "--ec-transfer-config"),
        ({"parallel_config": {"enable_elastic_ep": True}}, SETTINGS, "--enable-elastic-ep"),
        ({"use_v2_model_runner": True}, SETTINGS, "VLLM_USE_V2_MODEL_RUNNER=1"),
    ],
)
def test_unsupported_features_are_rejected_by_name(changes: dict[str, Any], settings: Settings, named: str) -> None:
    assert len(list(unsupported_features(config(**changes), settings))) == 1
    with pytest.raises(SettingError) as raised:
        validate(config(**changes), settings)
    assert f"({named})" in str(raised.value)
    assert "unset VLLM_RAY_ASCEND_EXECUTOR" in str(raised.value)


def test_the_second_model_runner_is_accepted_without_stages() -> None:
    validate(config(use_v2_model_runner=True, parallel_config={"pipeline_parallel_size": 1}), SETTINGS)


def test_pauses_hardly_prolong_a_wait() -> None:
    waited_s, tries = 0.001, 0
    while waited_s < 1.0:
        pause_s = next_pause_s(waited_s)
        assert 0 < pause_s <= 0.002 and pause_s < 0.051 * waited_s
        waited_s, tries = waited_s + pause_s, tries + 1
    assert tries < 1000  # where Ray tries as often as it can


def test_a_channel_is_read_with_pauses_until_there_is_a_message_or_the_limit_is_reached() -> None:
    timeouts: list[float] = []

    @with_pauses
    def read(_: object, timeout: float) -> str:
        timeouts.append(timeout)
        if len(timeouts) < 4:
            raise RayChannelTimeoutError("nothing yet")
        return "something"

    assert read(None, 60.0) == "something"
    assert timeouts == [0.001, 0.0, 0.0, 0.0]
    timeouts.clear()
    with pytest.raises(RayChannelTimeoutError):
        read(None, 0.0)
    assert timeouts == [0.0]


def test_a_sender_waits_for_all_acks() -> None:
    acks = AckTracker()
    assert acks.wait_for_acks(readers=2)
    acks.on_ack()
    assert not acks.wait_for_acks(readers=2, limit_s=0)
    acks.on_ack()
    assert acks.wait_for_acks(readers=2, limit_s=0)


def test_a_wait_for_acks_ends_with_its_cause() -> None:
    acks = AckTracker()
    acks.wait_for_acks(readers=1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(acks.wait_for_acks, 1)
        acks.close(RuntimeError("a worker died"))
        with pytest.raises(RuntimeError, match="a worker died"):
            waiting.result(60)
    with pytest.raises(RuntimeError, match="a worker died"):
        acks.wait_for_acks(readers=1)


def test_acks_are_routed_to_the_previous_stage_and_of_responses_to_the_last_one() -> None:
    acknowledged: list[int] = []
    router = AckRouter(create_layout(6, 3), acknowledged.append)
    assert router.own_acks.wait_for_acks(router.first_stage_size)
    for rank in range(6):
        router.on_ack(rank)
    assert acknowledged == [0, 1, 2, 3]
    assert router.own_acks.wait_for_acks(router.first_stage_size, 0)
    router.ack_responses()
    assert acknowledged[4:] == [4, 5]
