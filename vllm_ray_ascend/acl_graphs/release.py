"""Release of a worker's graphs, and their capture again: on request, and when the engine sleeps and wakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.acl_graphs.runner import clear_dispatch_keys, get_capture_state, is_supported_runner
from vllm_ray_ascend.settings import load

_ALL_TAGS = frozenset({"weights", "kv_cache"})
"""vLLM's tags of what a worker can put to sleep. Those that still sleep are an attribute of a worker whose graphs are
released."""


def release(worker: Any) -> None:
    """Destroy all graphs of ``worker``, which returns their streams and memory. It runs eagerly until `recapture`.

    Call it before groups are changed and before a sleep, on every rank of the engine before the next batch. May be
    called again, and where there are no graphs.
    """
    runner = worker.model_runner
    if is_supported_runner(runner):
        clear_dispatch_keys(runner)
        get_capture_state(runner).released = True
    current_accelerator().release_graphs(runner)


def recapture(worker: Any) -> None:
    """Capture the graphs of ``worker`` again after `release`, on all ranks together, with fallback as at the start.

    Groups, weights and KV cache have to be in place.
    """
    from vllm.config import set_current_vllm_config

    if not worker.model_config.enforce_eager:
        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.capture_model()


def with_release_on_sleep(sleep: Callable[..., None]) -> Callable[..., None]:
    """Return ``sleep`` of vllm-ascend's worker, which releases graphs first."""

    @functools.wraps(sleep)
    def release_and_sleep(worker: Any, *args: Any, **kwargs: Any) -> None:
        if load().graph_sleep == "release" and is_supported_runner(worker.model_runner):
            release(worker)
            worker._vllm_ray_ascend_sleeping_tags = _ALL_TAGS
        sleep(worker, *args, **kwargs)

    return release_and_sleep


def with_recapture_on_wake(wake_up: Callable[..., None]) -> Callable[..., None]:
    """Return ``wake_up`` of vllm-ascend's worker, which captures graphs again once weights and KV cache are awake."""

    @functools.wraps(wake_up)
    def wake_up_and_recapture(worker: Any, tags: list[str] | None = None) -> None:
        sleeping: frozenset[str] = getattr(worker, "_vllm_ray_ascend_sleeping_tags", frozenset())
        if not sleeping:
            wake_up(worker, tags)
            return
        remaining = sleeping - (_ALL_TAGS if tags is None else frozenset(tags))
        wake_up(worker, tags)  # with its own cleanup (rl_config.sleep_mode_extra_cleanup), vllm-ascend captures here
        worker._vllm_ray_ascend_sleeping_tags = remaining  # only now: a wake-up that raised can be tried again
        if not remaining and get_capture_state(worker.model_runner).released:
            recapture(worker)

    return wake_up_and_recapture
