"""What is arranged where the user's own process has joined Ray, and for vLLM's metrics in Ray."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from vllm_ray_ascend.compat.ray_metrics import without_serve
from vllm_ray_ascend.compat.start_method import ADDRESS, METHOD, PARENTS, spawn_beside_ray
from vllm_ray_ascend.plugin import join_as_parent

pytestmark = pytest.mark.unit


def test_nothing_is_changed_where_ray_was_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the engine is spawned where it was, tests/e2e/test_parity.py shows: a forked one hangs."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    for name in (METHOD, ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(PARENTS, f"{os.getpid()} 10.0.0.1:6379")
    spawn_beside_ray()
    assert not {METHOD, ADDRESS, PARENTS} & set(os.environ)


def test_a_cluster_of_no_parent_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.setenv(PARENTS, f"{os.getpid()} 10.0.0.1:6379")
    join_as_parent()
    assert ADDRESS not in os.environ


def test_metrics_are_found_where_serve_was_not() -> None:
    metrics = pytest.importorskip("ray.util.metrics")
    module = ModuleType("ray_wrappers")
    module.ray_metrics = module.ray_serve = None  # type: ignore[attr-defined]
    without_serve(module)
    assert module.ray_metrics is metrics and module.Metric is metrics.Metric
    assert module.ray_serve is None
