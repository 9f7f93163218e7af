"""Parts of the compiled graph's executor and worker, whose modules need vLLM: empty steps, and the tensor proxy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vllm_ray_ascend.compiled_graph.executor import is_empty_step
from vllm_ray_ascend.compiled_graph.worker import PipelineTensorProxy


class Group:
    """The part of vLLM's pipeline group that a worker calls."""

    def irecv_tensor_dict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the group itself was called")

    def isend_tensor_dict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the group itself was called")


def test_the_tensor_proxy_replaces_sends_and_receives() -> None:
    group = Group()
    tensor_proxy = PipelineTensorProxy(group, 0)
    tensor_proxy.set_incoming({"hidden_states": 1})
    assert group.irecv_tensor_dict(all_gather_group=None) == ({"hidden_states": 1}, [], [])
    assert group.isend_tensor_dict({"hidden_states": 2}, all_gather_group=None) == []
    assert tensor_proxy.take_outgoing() == {"hidden_states": 2}


def test_a_stage_without_tensors_is_an_error() -> None:
    group = Group()
    first, second = PipelineTensorProxy(Group(), 0), PipelineTensorProxy(group, 0)
    second.set_incoming(first.take_outgoing())
    with pytest.raises(RuntimeError, match="received no tensors"):
        group.irecv_tensor_dict()


@dataclasses.dataclass
class Cached:
    req_ids: list[str]


@dataclasses.dataclass
class Scheduled:
    """Stands in for vLLM's SchedulerOutput, which tests/softnpu/test_pipeline_scheduling.py uses itself."""

    total_num_scheduled_tokens: int = 0
    finished_req_ids: frozenset[str] = frozenset()
    num_common_prefix_blocks: tuple[int, ...] = (0,)
    scheduled_cached_reqs: Cached = dataclasses.field(default_factory=lambda: Cached([]))
    kv_connector_metadata: object = None


def test_empty_steps_are_recognised() -> None:
    assert is_empty_step(Scheduled())
    assert not is_empty_step(Scheduled(total_num_scheduled_tokens=1))
    assert not is_empty_step(Scheduled(finished_req_ids=frozenset({"a"})))
    assert not is_empty_step(Scheduled(scheduled_cached_reqs=Cached(["a"])))
    assert not is_empty_step(Scheduled(kv_connector_metadata=object()))
    assert not is_empty_step(object())
