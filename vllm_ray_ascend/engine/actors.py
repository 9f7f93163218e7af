"""Engine cores as Ray actors, one per data parallel rank. Imported by name on the rank's node, before __init__ runs.

That import and __init__ run before vLLM loads general plugins in the actor. So vllm-ascend's own patches of device
mapping are not applied here, and these classes are subclasses rather than patches.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from vllm_ray_ascend.control.client import ControlClient, server_location
from vllm_ray_ascend.control.protocol import EventReported
from vllm_ray_ascend.control.timeouts import stop_grace_s
from vllm_ray_ascend.engine.process import EngineLaunchContext, gc_paused, node_address, prepare_process
from vllm_ray_ascend.engine.rank_recovery import drain_seconds
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import ENGINE_FAILED, EVENTS, WORKERS_CHANGED, Event
from vllm_ray_ascend.settings import load

with gc_paused():  # in an actor's process, these are what imports vLLM
    from vllm import envs
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import DPMoEEngineCoreActor, EngineCoreActor, EngineShutdownState

logger = get_logger(__name__)


class NodeLocalEngineCore:
    """Mixed into vLLM's engine core actors: its own node's environment, NPUs that Ray assigns, an orderly shutdown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        launch_context: EngineLaunchContext = getattr(
            kwargs["addresses"], "launch_context", EngineLaunchContext("", {})
        )
        os.environ.update(launch_context.secrets)
        self.restarts_ranks = launch_context.restarts_ranks
        self.client_count = len(kwargs["addresses"].outputs)
        prepare_process()
        self._control = self._connect_control(launch_context.control_address, kwargs.get("dp_rank", 0))
        EVENTS.listen(self._report_change)
        super().__init__(*args, **kwargs)

    def run_busy_loop(self) -> None:
        """Run upstream's loop. A failure is reported to clients immediately, as by an engine core that is no Ray actor.

        That ends all ranks, so not where the driver restarts this one, nor while the engine is scaled: the ranks that
        serve may not need this one yet. Then the actor's process exits: upstream's driver detects a dead actor, but not
        one whose `run` raised.
        """
        try:
            super().run_busy_loop()  # type: ignore[misc]
        except Exception:  # whatever it is: upstream's driver waits for this process to exit
            logger.exception("VRA-303: the engine core failed")
            if not self.restarts_ranks and getattr(self, "eep_scaling_state", None) is None:
                self._send_engine_dead()  # type: ignore[attr-defined]
            raise SystemExit(1) from None

    def _connect_control(self, address_json: str, dp_rank: int) -> ControlClient | None:
        """Return the control connection to the driver; None where there is none: then Ray alone ends the engine."""
        if not address_json:
            return None
        try:
            return ControlClient(
                address_json,
                dp_rank,
                node_address(),
                load().silence_s,
                on_stop=self._request_shutdown,
                on_terminate=lambda lost: self._shut_down_within_limit(),
                describe_activity=lambda: "engine core",
                on_extension=self._handle_extension,
            )
        except OSError as error:
            logger.warning(
                "VRA-304: data parallel rank %d cannot connect to its driver at %s, so only Ray can stop it: %s. Allow "
                "TCP connections between the nodes.",
                dp_rank,
                server_location(address_json),
                error,
            )
            return None

    def _report_change(self, event: Event) -> None:
        """Let the driver know that a new engine core would lack what a call has changed: it then starts none.

        And that this one has failed, which it may do long before it exits: while it waits for a scaling's commit.
        """
        if event.event in (WORKERS_CHANGED.name, ENGINE_FAILED.name) and self._control is not None:
            self._control.send(EventReported(event.event, event.fields))

    def _handle_extension(self, name: str) -> None:
        """Finish the requests, for at most the seconds in the message, and exit: this node is about to be stopped."""
        if seconds := drain_seconds(name):
            self._exit_after(seconds)  # vLLM's engine core itself knows no limit
            self.vllm_config.shutdown_timeout = seconds  # type: ignore[attr-defined]
            self._request_shutdown()

    def _request_shutdown(self) -> None:
        """Do what SIGTERM does to an engine core that is no Ray actor; exit where the busy loop does not run yet."""
        if not hasattr(self, "shutdown_state"):
            os._exit(0)
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))  # type: ignore[attr-defined]

    def _shut_down_within_limit(self) -> None:
        """Shut down gracefully, since the driver is gone, and exit immediately where that takes too long."""
        config = getattr(self, "vllm_config", None)  # not before vLLM's own __init__
        ranks = config.parallel_config.world_size if config is not None else 1
        self._exit_after(stop_grace_s(load().stop_grace_s, ranks) + 1)
        self._request_shutdown()

    @staticmethod
    def _exit_after(seconds: float) -> None:
        """End this process, whatever it is doing then, unless it has ended before."""
        limit = threading.Timer(seconds, os._exit, (1,))
        limit.daemon = True
        limit.start()

    def _set_visible_devices(self, vllm_config: Any, local_dp_rank: int) -> None:
        """Assign no NPUs: the executor asks Ray which ones the placement group's bundles hold.

        vLLM computes [local_dp_rank x world size, ...) over this process's ASCEND_RT_VISIBLE_DEVICES: wrong where the
        node has other tenants, an error where a rank spans nodes (vllm-ascend #2879), and before vLLM 0.24 it writes
        the result into the environment, which workers inherit.
        """
        if hasattr(vllm_config.parallel_config, "assigned_physical_gpu_ids"):
            vllm_config.parallel_config.assigned_physical_gpu_ids = None


class RayAscendEngineCoreActor(NodeLocalEngineCore, EngineCoreActor):
    """vLLM's engine core actor of a dense model."""


class RayAscendDPMoEEngineCoreActor(NodeLocalEngineCore, DPMoEEngineCoreActor):
    """vLLM's engine core actor of a data parallel MoE model, whose ranks step together."""

    def _init_data_parallel(self, vllm_config: Any) -> None:
        """Create the data parallel group, as upstream; a rank that joins others tells them that it comes to do so."""
        config = vllm_config.parallel_config
        if getattr(config, "enable_elastic_ep", False):
            from vllm_ray_ascend.elastic_ep.rendezvous import announce
            from vllm_ray_ascend.engine import elastic_state

            elastic_state.install()
            if envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH:
                host, port = config.data_parallel_master_ip, config._coord_store_port
                announce(host, port, "cores", config.data_parallel_rank)
        super()._init_data_parallel(vllm_config)

    def roll_back_elastic_ep(self) -> bool:
        """Undo what was prepared for a scaling that has failed. Called by the API server."""
        from vllm_ray_ascend.engine import elastic_state

        return elastic_state.roll_back(self)
