"""The compiled graph of one engine, in the process of its executor."""

from __future__ import annotations

import collections
import contextlib
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ray.exceptions import RayChannelTimeoutError

from vllm_ray_ascend.compiled_graph import patience
from vllm_ray_ascend.compiled_graph.parcel import pack
from vllm_ray_ascend.compiled_graph.receipts import Post
from vllm_ray_ascend.compiled_graph.shape import Shape
from vllm_ray_ascend.lifecycle.shared_memory import channels, remove
from vllm_ray_ascend.transport.pipeline import HcclPPCommunicator

_FIRST_WORD_S = 1.0
"""A worker's own word of what went wrong may come after Ray's."""


class Faults(NamedTuple):
    """What the executor says of a step that fails."""

    late: Callable[[], Exception]
    """It takes too long."""
    cause: Callable[[float], BaseException | None]
    """What has ended the engine, or ends it within so many seconds; None where nothing does."""


class Step(Future):  # type: ignore[type-arg]
    """One execution of the graph. Its answer is read when somebody asks for it, in that thread."""

    def __init__(self, graph: Graph, limit_s: float) -> None:
        super().__init__()
        self._graph = graph
        self.deadline = time.monotonic() + limit_s
        self.references: list[Any] = []
        self.kept: Any = None
        """What has to live until the answer is there."""

    def result(self, timeout: float | None = None) -> Any:
        """What the last stage's rank answered; ``timeout`` is the step's own."""
        self._graph.read_until(self)
        return super().result()


class Graph:
    """The stages of a pipeline as a Ray compiled graph, of which several executions are under way.

    Used by one thread, but for `cancel`. Ray's own monitor of a graph calls methods of the workers to end it, which
    their main threads, busy with vLLM's calls, would never answer: it is taken out of service. The executor watches
    its workers itself, and they close their ends by themselves.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        shape: Shape,
        in_flight: int,
        limit_s: float,
        faults: Faults,
        post: Post | None = None,
    ) -> None:
        """Compile the graph over ``actors``, by rank, whose main threads are free. ``in_flight``: executions that may
        be under way; ``limit_s``: seconds of one; ``post``: of a graph between nodes."""
        import ray
        from ray.dag import DAGContext

        self._room = int(DAGContext.get_current().buffer_size_bytes)
        self._limit_s, self._faults, self._post = limit_s, faults, post
        self._answering = shape.stages[-1][0]
        self._steps: collections.deque[Step] = collections.deque()
        self._cause: BaseException | None = None
        self._all_open = False
        """Whether every end of every channel is open, which the first answer shows: their names are needed no more."""
        patience.install()
        ray.get([actor.prepare_graph.remote(self._room, post is not None) for actor in actors])
        self._dag: Any = _outputs(actors, shape, limit_s).experimental_compile(
            _submit_timeout=limit_s,
            _max_inflight_executions=in_flight + 1,
            _overlap_gpu_communication=False,
            _default_communicator=None,
        )
        self._dag._monitor._teardown_done = True
        self._dag.worker_task_refs = {}  # an answer that fails would wait for all of them
        tasks = self._dag.actor_to_executable_tasks
        ray.get([actor.keep_tasks.remote(tasks[actor]) for actor in actors])

    def execute(self, scheduler_output: Any, grammar_output: Any) -> Step:
        """Begin a step. Raises what `cancel` was given, and where the graph takes no more in time."""
        self._check()
        step = Step(self, self._limit_s)
        message, step.kept = pack((scheduler_output, grammar_output, self._answering, self._all_open), self._room)
        if self._post is not None and not self._post.own.before_sending(self._post.first, self._limit_s):
            raise self._faults.late()
        try:
            step.references = self._dag.execute(message)
        except RayChannelTimeoutError as error:
            raise self._cause or self._faults.late() from error
        except Exception as error:
            raise self._cause or self._faults.cause(_FIRST_WORD_S) or error from error
        self._steps.append(step)
        return step

    def read_until(self, step: Step) -> None:
        """Read the answers up to that of ``step``."""
        while not step.done():
            self._read(self._steps.popleft())

    def drain(self, limit_s: float | None = None) -> None:
        """Wait for all steps that are under way, ``limit_s`` seconds at most for the last of them to end; whoever has
        them asks for what they answered."""
        if limit_s is not None:
            end = time.monotonic() + limit_s
            self._faults = Faults(lambda: TimeoutError("the engine has ended"), lambda _: None)
            for step in self._steps:
                step.deadline = min(step.deadline, end)
        while self._steps:
            self._read(self._steps.popleft())

    def cancel(self, cause: BaseException) -> None:
        """End every read and write with ``cause``, now and later. May be called in any thread."""
        if self._cause is None:
            self._end(cause)

    def close(self) -> None:
        """Close this end of the channels, and end the actor that Ray has for it."""
        import ray

        if self._cause is None:
            self._end(RuntimeError("the engine has ended"))
        for step in self._steps:
            step.set_exception(self._cause)
        self._steps.clear()
        self._dag._is_teardown = True  # nothing is left to do for Ray when it shuts down
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.kill(self._dag._proxy_actor)

    def _read(self, step: Step) -> None:
        """Take the answer of the oldest step, which is ``step``."""
        try:
            self._check()
            left_s = max(0.0, step.deadline - time.monotonic())
            answers = [each.get(timeout=left_s) for each in step.references]  # Ray keeps what nobody asks for
            if self._post is not None:
                self._post.answers_read()
            step.set_result(pickle.loads(answers[0]))
            if not self._all_open:
                self._all_open = True
                remove(channels())
        except RayChannelTimeoutError as error:
            step.set_exception(self._cause or _caused(self._faults.late(), error))
        except Exception as error:  # noqa: BLE001  whoever asks for the answer gets it
            step.set_exception(self._cause or self._faults.cause(_FIRST_WORD_S) or error)
        step.references, step.kept = [], None

    def _check(self) -> None:
        if self._cause is not None:
            raise self._cause

    def _end(self, cause: BaseException) -> None:
        self._cause = cause
        if self._post is not None:
            self._post.own.close(cause)
        for end in (self._dag._dag_submitter, self._dag._dag_output_fetcher):
            with contextlib.suppress(Exception):  # a channel whose other end is gone
                end.close()


def _outputs(actors: Sequence[Any], shape: Shape, limit_s: float) -> Any:
    """The graph: a step's message goes to the first stage, and from each stage to the next one with the tensors."""
    from ray.dag import InputNode, MultiOutputNode

    pipelines = [[actors[rank] for rank in ranks] for ranks in shape.pipelines()]
    transports = [HcclPPCommunicator(len(each), None, None, each, limit_s=limit_s) for each in pipelines]
    with InputNode() as message:
        nodes = [actors[rank].graph_step.bind(message) for rank in shape.stages[0]]
        for ranks in shape.stages[1:]:
            before = [node.with_tensor_transport(transport=via) for node, via in zip(nodes, transports, strict=True)]
            nodes = [actors[rank].graph_next.bind(each) for rank, each in zip(ranks, before, strict=True)]
        return MultiOutputNode(nodes)


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
