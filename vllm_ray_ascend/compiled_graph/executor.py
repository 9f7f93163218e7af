"""The executor of VLLM_RAY_ASCEND_EXECUTOR=compiled_graph. Imported late: it needs vLLM and Ray."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from vllm_ray_ascend.compiled_graph.graph import Faults, Graph
from vllm_ray_ascend.compiled_graph.news import says_nothing
from vllm_ray_ascend.compiled_graph.receipts import Post
from vllm_ray_ascend.compiled_graph.refusal import refuse
from vllm_ray_ascend.compiled_graph.shape import Shape, shape_of
from vllm_ray_ascend.compiled_graph.worker import CompiledGraphWorkerProc
from vllm_ray_ascend.executor.executor import RayAscendExecutor
from vllm_ray_ascend.executor.start import Start
from vllm_ray_ascend.lifecycle.deadlines import GRAPH, STEPS
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)


class CompiledGraphExecutor(RayAscendExecutor):
    """RayAscendExecutor, whose steps are executions of a Ray compiled graph; all else is as there.

    vLLM asks twice for a step, for the forward pass and for its tokens; the graph runs both when the second comes.
    """

    _worker_class = CompiledGraphWorkerProc
    _graph: Graph | None = None

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """No: a graph gives its answers when they are complete. vLLM then switches it off, or refuses it if asked."""
        return False

    def _init_executor(self) -> None:
        refuse(self.vllm_config, load())
        self._scheduled: Any = None
        super()._init_executor()

    def _new_start(self) -> Start:
        return Start(self._life, before_run=self._compile)

    def _compile(self) -> None:
        """Ray compiles a graph with calls of its actors, which they answer as long as vLLM has not got their main
        threads."""
        handles = sorted(self.ray_worker_handles, key=lambda handle: handle.rank)
        shape = shape_of(len(handles), self.parallel_config.pipeline_parallel_size)
        # vLLM 0.25 and later say so; before, there are as many as stages.
        in_flight = getattr(self.vllm_config, "max_concurrent_batches", len(shape.stages))
        faults = Faults(functools.partial(self._late, STEPS[0], "", self._hang_s), self._life.wait_for_loss)
        actors = [handle.actor for handle in handles]
        make = functools.partial(Graph, actors, shape, in_flight, self._hang_s, faults, self._post(shape))
        with self._start.phase(GRAPH):
            self._graph = self._start.watched(make, GRAPH)

    def _post(self, shape: Shape) -> Post | None:
        """Where the graph is on one node, its channels are shared memory, and nothing stands still."""
        import ray

        peers = self._life.peers()
        if {peer.node for peer in peers} == {str(ray.util.get_node_ip_address())}:
            return None
        post = Post(shape, self._life.was_read)
        if self._life.connect_post(sum(map(len, shape.stages)), post.read_by):
            return post
        logger.warning(
            "Not all ranks could connect to this node, so none can say what it has read: a worker that dies may leave "
            "its node's raylet waiting for it (ray-project/ray#49044). See that no firewall stands between the nodes."
        )
        return None

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Keep what is to be computed until `sample_tokens`; at once where there is nothing to sample."""
        self._life.check()
        if self._scheduled is not None:
            raise RuntimeError("sample_tokens() has to follow an execute_model() that returned None")
        if says_nothing(scheduler_output):
            return _done(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        if not scheduler_output.total_num_scheduled_tokens or self.model_config.runner_type == "pooling":
            return self._step(scheduler_output, None, non_block)
        self._scheduled = scheduler_output
        return _done(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Run the step that `execute_model` was given."""
        scheduled, self._scheduled = self._scheduled, None
        if scheduled is None:
            return _done(None) if non_block else None
        return self._step(scheduled, grammar_output, non_block)

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """As RayAscendExecutor's, after the steps that are under way: they run in another thread of the workers."""
        if self._graph is not None:
            self._graph.drain()
        return super().collective_rpc(method, *args, **kwargs)

    def wake(self, cause: BaseException) -> None:
        """Of the graph as well."""
        if self._graph is not None:
            self._graph.cancel(cause)
        super().wake(cause)

    def shutdown(self) -> None:
        """End the graph with its workers, in order where all is well: after the steps that are under way."""
        graph, self._graph = self._graph, None
        if graph is not None and getattr(self, "_life", None) is not None and self._life.cause is None:
            graph.drain(load().stop_grace_s)
        super().shutdown()
        if graph is not None:
            graph.close()

    def _step(self, scheduler_output: Any, grammar_output: Any, non_block: bool) -> Any:
        self._life.check()
        assert self._graph is not None
        execute = functools.partial(self._graph.execute, scheduler_output, grammar_output)
        step = self._life.pulse.during(execute)
        return step if non_block else step.result()


def _done(answer: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(answer)
    return done
