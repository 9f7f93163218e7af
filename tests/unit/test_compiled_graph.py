"""The compiled graph's shape, what its executor refuses, and how it waits."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayChannelTimeoutError

from vllm_ray_ascend.compiled_graph import patience
from vllm_ray_ascend.compiled_graph.carrier import Carrier
from vllm_ray_ascend.compiled_graph.news import says_nothing
from vllm_ray_ascend.compiled_graph.patience import pause_after
from vllm_ray_ascend.compiled_graph.receipts import Post, Receipts
from vllm_ray_ascend.compiled_graph.refusal import obstacles, refuse
from vllm_ray_ascend.compiled_graph.shape import shape_of
from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.settings import Settings

pytestmark = pytest.mark.unit

SETTINGS = Settings(executor="compiled_graph")


def config(**changes: Any) -> SimpleNamespace:
    """What is read of a VllmConfig, as of a plain engine with two stages; ``changes`` by section, or of the whole."""
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
    shape = shape_of(world_size, stages)
    assert shape.stages == expected
    assert shape.pipelines() == pipelines


def test_ranks_that_cannot_be_dealt_out_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 ranks cannot be dealt out to 2 stages"):
        shape_of(5, 2)


def test_a_plain_engine_is_taken() -> None:
    refuse(config(), SETTINGS)
    refuse(config(parallel_config={"data_parallel_size": 2}), SETTINGS)


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
def test_what_cannot_work_is_refused_by_name(changes: dict[str, Any], settings: Settings, named: str) -> None:
    assert len(list(obstacles(config(**changes), settings))) == 1
    with pytest.raises(SettingError) as raised:
        refuse(config(**changes), settings)
    assert f"({named})" in str(raised.value)
    assert "unset VLLM_RAY_ASCEND_EXECUTOR" in str(raised.value)


def test_the_second_model_runner_is_taken_without_stages() -> None:
    refuse(config(use_v2_model_runner=True, parallel_config={"pipeline_parallel_size": 1}), SETTINGS)


class Group:
    """The part of vLLM's pipeline group that a worker calls."""

    def irecv_tensor_dict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the group itself was asked")

    def isend_tensor_dict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the group itself was asked")


def test_the_carrier_hands_over_what_a_worker_would_send_and_receive() -> None:
    group = Group()
    carrier = Carrier(group, 0)
    carrier.bring({"hidden_states": 1})
    assert group.irecv_tensor_dict(all_gather_group=None) == ({"hidden_states": 1}, [], [])
    assert group.isend_tensor_dict({"hidden_states": 2}, all_gather_group=None) == []
    assert carrier.take() == {"hidden_states": 2}


def test_a_stage_without_tensors_says_so() -> None:
    group = Group()
    here, there = Carrier(Group(), 0), Carrier(group, 0)
    there.bring(here.take())
    with pytest.raises(RuntimeError, match="got no tensors"):
        group.irecv_tensor_dict()


def test_a_wait_is_hardly_longer_for_its_pauses() -> None:
    waited_s, looks = 0.001, 0
    while waited_s < 1.0:
        pause_s = pause_after(waited_s)
        assert 0 < pause_s <= 0.002 and pause_s < 0.051 * waited_s
        waited_s, looks = waited_s + pause_s, looks + 1
    assert looks < 1000  # where Ray looks as often as it can


def test_a_channel_is_read_with_pauses_until_it_has_something_or_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def read(_: object, timeout: float) -> str:
        asked.append(timeout)
        if len(asked) < 4:
            raise RayChannelTimeoutError("nothing yet")
        return "something"

    monkeypatch.setattr(patience, "upstream", lambda *_: read)
    assert patience._read(None, 60.0) == "something"
    assert asked == [0.001, 0.0, 0.0, 0.0]
    asked.clear()
    with pytest.raises(RayChannelTimeoutError):
        patience._read(None, 0.0)
    assert asked == [0.0]


@dataclasses.dataclass
class Cached:
    req_ids: list[str]


@dataclasses.dataclass
class Scheduled:
    """As vLLM's SchedulerOutput, whose own tests/softnpu/test_pipeline_scheduling.py has."""

    total_num_scheduled_tokens: int = 0
    finished_req_ids: frozenset[str] = frozenset()
    num_common_prefix_blocks: tuple[int, ...] = (0,)
    scheduled_cached_reqs: Cached = dataclasses.field(default_factory=lambda: Cached([]))
    kv_connector_metadata: object = None


def test_a_step_is_sent_only_where_it_says_something() -> None:
    assert says_nothing(Scheduled())
    assert not says_nothing(Scheduled(total_num_scheduled_tokens=1))
    assert not says_nothing(Scheduled(finished_req_ids=frozenset({"a"})))
    assert not says_nothing(Scheduled(scheduled_cached_reqs=Cached(["a"])))
    assert not says_nothing(Scheduled(kv_connector_metadata=object()))
    assert not says_nothing(object())


def test_nobody_sends_before_all_have_read() -> None:
    receipts = Receipts()
    assert receipts.before_sending(readers=2)
    receipts.came()
    assert not receipts.before_sending(readers=2, limit_s=0)
    receipts.came()
    assert receipts.before_sending(readers=2, limit_s=0)


def test_a_wait_for_receipts_ends_with_its_cause() -> None:
    receipts = Receipts()
    receipts.before_sending(readers=1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(receipts.before_sending, 1)
        receipts.close(RuntimeError("a worker died"))
        with pytest.raises(RuntimeError, match="a worker died"):
            waiting.result(60)
    with pytest.raises(RuntimeError, match="a worker died"):
        receipts.before_sending(readers=1)


def test_receipts_go_to_the_stage_before_and_answers_to_the_last_one() -> None:
    told: list[int] = []
    post = Post(shape_of(6, 3), told.append)
    assert post.own.before_sending(post.first)
    for rank in range(6):
        post.read_by(rank)
    assert told == [0, 1, 2, 3]
    assert post.own.before_sending(post.first, 0)
    post.answers_read()
    assert told[4:] == [4, 5]
