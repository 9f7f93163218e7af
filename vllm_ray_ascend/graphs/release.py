"""Graphs of a worker are destroyed, and captured anew."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.graphs.runner import forget_keys, is_supported, state_of


def release(worker: Any) -> None:
    """Destroy all graphs of ``worker``, which gives their streams and memory back. Until `recapture` it runs eagerly.

    Before groups are changed, and before a sleep. May be called again, and where there are no graphs. Every rank of the
    engine has to do it before the next batch.
    """
    runner = worker.model_runner
    if is_supported(runner):
        forget_keys(runner)
        state_of(runner).released = True
    current().release_graphs(runner)


def recapture(worker: Any) -> None:
    """Capture the graphs of ``worker`` anew after `release`, on all ranks at once; steps down as at the start.

    Groups, weights and KV cache have to be in place.
    """
    from vllm.config import set_current_vllm_config

    if not worker.model_config.enforce_eager:
        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.capture_model()
