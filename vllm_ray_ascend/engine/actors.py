"""Engine cores as Ray actors, one per data parallel rank. Imported by name on the rank's node, before __init__ runs.

That import and __init__ come before vLLM loads general plugins in the actor, which is why vllm-ascend's own patches of
device mapping are not in force here, and why these are subclasses and not patches.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.core import DPMoEEngineCoreActor, EngineCoreActor

from vllm_ray_ascend.engine.process import prepare_process


class _OnItsNode:
    """An engine core with its own node's environment, whose NPUs Ray assigns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        prepare_process()
        super().__init__(*args, **kwargs)

    def _set_visible_devices(self, vllm_config: Any, local_dp_rank: int) -> None:
        """Guess no NPUs: the executor learns from Ray which ones the placement group's bundles hold.

        vLLM computes [local_dp_rank x world size, ...) over this process's ASCEND_RT_VISIBLE_DEVICES: wrong where the
        node has other tenants, an error where a rank spans nodes (vllm-ascend #2879), and before vLLM 0.24 it writes
        the guess into the environment, which workers inherit.
        """
        if hasattr(vllm_config.parallel_config, "assigned_physical_gpu_ids"):
            vllm_config.parallel_config.assigned_physical_gpu_ids = None


class RayAscendEngineCoreActor(_OnItsNode, EngineCoreActor):
    """vLLM's engine core actor of a dense model."""


class RayAscendDPMoEEngineCoreActor(_OnItsNode, DPMoEEngineCoreActor):
    """vLLM's engine core actor of a data parallel MoE model, which steps in time with its siblings."""
