"""An engine core's part in a scaling: a preparation that fails is reported and can be rolled back; the core serves on.

vLLM's core dies of it, minutes later: the exception comes out of its busy loop.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm.distributed import stateless_destroy_torch_distributed_process_group
from vllm.distributed.elastic_ep.elastic_state import ElasticEPScalingState

from vllm_ray_ascend import patches
from vllm_ray_ascend.elastic_ep.rendezvous import report_failure, wait_for_announcements
from vllm_ray_ascend.errors import ElasticEPError
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_IDLE_POLL_S = 0.01


def install() -> None:
    """Let the engine cores of this process use our state of a scaling."""
    patches.apply("vllm.distributed.elastic_ep.elastic_state.ElasticEPScalingState", GuardedScalingState)


def roll_back(core: Any) -> bool:
    """Undo what engine core ``core`` has prepared; return whether that is done, or there was nothing.

    Where it is not, it has to be called again: the core serves meanwhile. Raises ElasticEPError where the commit has
    begun.
    """
    state: GuardedScalingState | None = core.eep_scaling_state
    if state is None:
        return True
    if state.commit_requested:
        raise ElasticEPError("VRA-341", "a scaling cannot be rolled back any more: the engine cores are committing it")
    if not state.roll_back():
        return False
    core.eep_scaling_state = None
    core.process_input_queue_block = True
    return True


class GuardedScalingState(ElasticEPScalingState):
    """vLLM's state of a scaling, in which a failure before the commit does not end the engine core."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rolled_back = threading.Event()
        self._has_failed = False

    def progress(self) -> bool:
        """Do the next step, as upstream, which asks for it in a loop: without requests, a moment later."""
        has_moved = self._progress()
        core = self.engine_core
        if not has_moved and not core.engines_running and not core.scheduler.has_unfinished_requests():
            time.sleep(_IDLE_POLL_S)
        return has_moved

    def _progress(self) -> bool:
        if self._has_failed:
            return False
        try:
            return bool(super().progress())
        except Exception as error:  # whatever it is: upstream lets it end a core that serves
            if self.worker_type != "existing" or self.commit_requested:
                raise
            self._has_failed = True
            logger.exception("VRA-342: the preparation of a scaling failed; this engine core continues as it was")
            config = self.new_parallel_config
            report_failure(config.data_parallel_master_ip, config._coord_store_port, self.engine_core.dp_rank, error)
            return False

    def roll_back(self) -> bool:
        """Undo what was prepared. Return whether that is done; where not, it has to be called again."""
        self._rolled_back.set()
        self._has_failed = True
        if not all(self._collective_rpc("elastic_ep_execute", args=("roll_back",))):
            return False
        future = self._prepare_future
        if future is not None and not future.done():
            return False
        groups = [self.new_dp_group]
        if future is not None and future.exception() is None and isinstance(future.result(), tuple):
            groups.append(future.result()[0])
        for group in filter(None, groups):
            # In its thread: it waits for an operation whose other ranks may not have given up yet.
            self._prepare_executor.submit(stateless_destroy_torch_distributed_process_group, group)
        self._prepare_executor.shutdown(wait=False)
        return True

    def _init_new_dp_group(self) -> tuple[Any, Any]:
        config, present = self.new_parallel_config, self.vllm_config.parallel_config.data_parallel_size
        joining = range(present, config.data_parallel_size)
        wait_for_announcements(
            config.data_parallel_master_ip, config._coord_store_port, "cores", joining, self._rolled_back
        )
        group: tuple[Any, Any] = super()._init_new_dp_group()
        return group
