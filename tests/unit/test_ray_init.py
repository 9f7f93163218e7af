"""Start method and cluster of an engine whose parent has joined Ray; vLLM's metrics in Ray without Ray Serve."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from vllm_ray_ascend.compat.ray_metrics import allow_without_serve
from vllm_ray_ascend.compat.start_method import PARENT_CLUSTER, RAY_ADDRESS, START_METHOD, force_spawn_after_ray_init
from vllm_ray_ascend.executor.death_cause import ray_failure
from vllm_ray_ascend.plugin import join_parent_cluster

pytestmark = pytest.mark.unit


def test_nothing_is_changed_where_ray_was_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the engine is spawned where it was, tests/e2e/test_parity.py shows: a forked one hangs."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    for name in (START_METHOD, RAY_ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(PARENT_CLUSTER, f"{os.getpid()} 10.0.0.1:6379")
    force_spawn_after_ray_init()
    assert not {START_METHOD, RAY_ADDRESS, PARENT_CLUSTER} & set(os.environ)


def test_a_cluster_of_no_parent_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RAY_ADDRESS, raising=False)
    monkeypatch.setenv(PARENT_CLUSTER, f"{os.getpid()} 10.0.0.1:6379")
    join_parent_cluster()
    assert RAY_ADDRESS not in os.environ


def test_metrics_are_found_where_serve_was_not() -> None:
    metrics = pytest.importorskip("ray.util.metrics")
    module = ModuleType("ray_wrappers")
    module.ray_metrics = module.ray_serve = None  # type: ignore[attr-defined]
    allow_without_serve(module)
    assert module.ray_metrics is metrics and module.Metric is metrics.Metric
    assert module.ray_serve is None


def test_the_cause_of_a_death_is_not_asked_of_ray_where_it_was_left() -> None:
    """`ray.wait` would start a cluster of its own, or join another one."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    assert ray_failure(object()) == ""
    assert not ray.is_initialized()
