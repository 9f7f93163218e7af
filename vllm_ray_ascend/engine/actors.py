"""Engine cores as Ray actors, one per data parallel rank. Imported by name on the rank's node, before __init__ runs.

That import and __init__ come before vLLM loads general plugins in the actor, which is why vllm-ascend's own patches of
device mapping are not in force here, and why these are subclasses and not patches.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPMoEEngineCoreActor, EngineCoreActor, EngineShutdownState

from vllm_ray_ascend.engine.process import ENGINE_LIFELINE, node_address, prepare_process
from vllm_ray_ascend.lifecycle.lifeline import Lifeline
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)


class _OnItsNode:
    """An engine core with its own node's environment, whose NPUs Ray assigns, and which ends in order when told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        prepare_process()
        self._lifeline = self._connect(kwargs.get("dp_rank", 0))
        super().__init__(*args, **kwargs)

    def run_busy_loop(self) -> None:
        """As upstream's; a failure is told to clients at once, as an engine core that is no Ray actor does it.

        Then the actor's process ends: upstream's driver knows a dead actor, but not one whose `run` raised.
        """
        try:
            super().run_busy_loop()  # type: ignore[misc]
        except Exception:
            logger.exception("the engine core failed")
            self._send_engine_dead()  # type: ignore[attr-defined]
            raise SystemExit(1) from None

    def _connect(self, dp_rank: int) -> Lifeline | None:
        """The connection to the driver; without it the engine is ended by Ray alone."""
        text = os.environ.get(ENGINE_LIFELINE)
        if not text:
            return None
        try:
            return Lifeline(
                text,
                dp_rank,
                node_address(),
                load().silence_s,
                on_stop=self._stop,
                on_end=lambda lost: self._end(),
                activity=lambda: "engine core",
            )
        except OSError as error:
            logger.warning("data parallel rank %d cannot reach its driver at %s: %s", dp_rank, text, error)
            return None

    def _stop(self) -> None:
        """What SIGTERM does to an engine core that is no Ray actor. One that still starts has no loop to leave."""
        if not hasattr(self, "shutdown_state"):
            os._exit(0)
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))  # type: ignore[attr-defined]

    def _end(self) -> None:
        """The driver is gone: end in order, and at once where that takes too long."""
        limit = threading.Timer(load().stop_grace_s + 1, os._exit, (1,))
        limit.daemon = True
        limit.start()
        self._stop()

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
