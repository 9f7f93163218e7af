"""Graphs are released when a worker goes to sleep, and captured anew when all of it is awake again.

vllm-ascend does so only with `rl_config.sleep_mode_extra_cleanup`, and then not for models without compilation, whose
graphs would be replayed over communicators that it destroyed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend.graphs.release import recapture, release
from vllm_ray_ascend.graphs.runner import is_supported, state_of
from vllm_ray_ascend.settings import load

_TAGS = frozenset({"weights", "kv_cache"})
_ASLEEP = "_vllm_ray_ascend_asleep"


def releasing(sleep: Callable[..., None]) -> Callable[..., None]:
    """``sleep`` of vllm-ascend's worker, after its graphs are released."""

    @functools.wraps(sleep)
    def sleeping(worker: Any, *args: Any, **kwargs: Any) -> None:
        if load().graph_sleep == "release" and is_supported(worker.model_runner):
            release(worker)
            setattr(worker, _ASLEEP, _TAGS)
        sleep(worker, *args, **kwargs)

    return sleeping


def recapturing(wake_up: Callable[..., None]) -> Callable[..., None]:
    """``wake_up`` of vllm-ascend's worker, after which graphs are there again once weights and KV cache are."""

    @functools.wraps(wake_up)
    def waking(worker: Any, tags: list[str] | None = None) -> None:
        asleep: frozenset[str] = getattr(worker, _ASLEEP, frozenset())
        if not asleep:
            wake_up(worker, tags)
            return
        still = asleep - (_TAGS if tags is None else frozenset(tags))
        setattr(worker, _ASLEEP, still)
        wake_up(worker, tags)  # with its own cleanup, vllm-ascend captures here
        if not still and state_of(worker.model_runner).released:
            recapture(worker)

    return waking
