"""The executor of VLLM_RAY_ASCEND_EXECUTOR=compiled_graph. Imported late: it needs vLLM and Ray."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from vllm_ray_ascend.compiled_graph.dag import FailureCallbacks, PipelineDag
from vllm_ray_ascend.compiled_graph.flow_control import ACK, AckRouter
from vllm_ray_ascend.compiled_graph.layout import PipelineLayout, create_layout
from vllm_ray_ascend.compiled_graph.validation import validate
from vllm_ray_ascend.compiled_graph.worker import CompiledGraphWorkerProc
from vllm_ray_ascend.control.timeouts import GRAPH, STEPS
from vllm_ray_ascend.executor.executor import RayAscendExecutor
from vllm_ray_ascend.executor.supervisor import run_each
from vllm_ray_ascend.executor.worker_calls import completed_future
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_IGNORED_FIELDS = {"num_common_prefix_blocks"}
"""It describes the requests that are scheduled: where there are none, it is a list of zeros."""


class CompiledGraphExecutor(RayAscendExecutor):
    """RayAscendExecutor, whose steps are executions of a Ray compiled graph; all else is as there.

    vLLM makes two calls for a step, for the forward pass and for its tokens; the graph runs both at the second one.
    """

    _worker_class = CompiledGraphWorkerProc
    _dag: PipelineDag | None = None

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Return False: a graph returns complete responses. vLLM then disables it, or rejects it if requested."""
        return False

    def _init_executor(self) -> None:
        validate(self.vllm_config, load())
        self._scheduled: Any = None
        super()._init_executor()

    def _before_run(self) -> None:
        """Compile the graph. Ray does so by calls of its actors, whose main threads are free until vLLM's busy loop."""
        handles = sorted(self.ray_worker_handles, key=lambda handle: handle.rank)
        layout = create_layout(len(handles), self.parallel_config.pipeline_parallel_size)
        # vLLM 0.25 and later have the number; before, there are as many as stages.
        max_in_flight = getattr(self.vllm_config, "max_concurrent_batches", len(layout.stages))
        compile_dag = functools.partial(
            PipelineDag,
            [handle.actor for handle in handles],
            layout,
            max_in_flight,
            self._hang_s,
            FailureCallbacks(
                functools.partial(self._fail_late, STEPS[0], "", self._hang_s), self._supervisor.wait_for_failure
            ),
            self._create_ack_router(layout),
        )
        with self._startup.track_phase(GRAPH):
            self._dag = self._startup.run_supervised(compile_dag, GRAPH)

    def _create_ack_router(self, layout: PipelineLayout) -> AckRouter | None:
        """Return None where all workers are on this node: its channels are shared memory, and block no raylet."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        if all(handle.node_id == here for handle in self.ray_worker_handles):
            return None
        workers = self._supervisor.connected_workers()
        if len(workers) < sum(map(len, layout.stages)):
            logger.warning(
                "VRA-453: not all ranks could connect to this node, so none can acknowledge what it has read: a worker "
                "that dies may leave its node's raylet waiting for it (ray-project/ray#49044). Check that no firewall "
                "stands between the nodes."
            )
            return None
        router = AckRouter(layout, lambda rank: self._supervisor.send_extension(rank, ACK))
        self._supervisor.set_extension_handler(lambda rank, name: router.on_ack(rank) if name == ACK else None)
        return router

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Keep what is to be computed until `sample_tokens`; run it immediately where there is nothing to sample."""
        self._supervisor.raise_if_failed()
        if self._scheduled is not None:
            raise RuntimeError("VRA-454: sample_tokens() has to follow an execute_model() that returned None")
        if is_empty_step(scheduler_output):
            return completed_future(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        if not scheduler_output.total_num_scheduled_tokens or self.model_config.runner_type == "pooling":
            return self._execute_step(scheduler_output, None, non_block)
        self._scheduled = scheduler_output
        return completed_future(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Run the step that `execute_model` was given."""
        scheduled, self._scheduled = self._scheduled, None
        if scheduled is None:
            return completed_future(None) if non_block else None
        return self._execute_step(scheduled, grammar_output, non_block)

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of all workers after the steps in flight, which run in another thread of the workers."""
        if self._dag is not None:
            self._dag.drain()
        return super().collective_rpc(method, *args, **kwargs)

    def cancel_waits(self, cause: BaseException) -> None:
        """End every wait for a response with ``cause``, those for the graph included."""
        cancels = [super().cancel_waits] if self._dag is None else [self._dag.cancel, super().cancel_waits]
        run_each(*(functools.partial(cancel, cause) for cancel in cancels))

    def shutdown(self) -> None:
        """End the graph with its workers; without a failure gracefully, after the steps in flight."""
        dag, self._dag = self._dag, None
        supervisor = getattr(self, "_supervisor", None)
        if dag is not None and supervisor is not None and supervisor.wait_for_failure(0) is None:
            dag.drain(load().stop_grace_s)
        super().shutdown()
        if dag is not None:
            dag.close()

    def _execute_step(self, scheduler_output: Any, grammar_output: Any, non_block: bool) -> Any:
        self._supervisor.raise_if_failed()
        assert self._dag is not None
        execute = functools.partial(self._dag.execute, scheduler_output, grammar_output)
        step = self._supervisor.health_check.track(execute)
        return step if non_block else step.result()


def is_empty_step(scheduled: Any) -> bool:
    """Return whether a SchedulerOutput (vLLM 0.23 to 0.33) has no tokens, finished requests or connector metadata.

    Such a step need not be sent to the workers.
    """
    if dataclasses.is_dataclass(scheduled):
        names = (field.name for field in dataclasses.fields(scheduled))
        return all(is_empty_step(getattr(scheduled, name)) for name in names if name not in _IGNORED_FIELDS)
    return not scheduled
