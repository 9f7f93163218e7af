"""The Ray compiled graph of one engine, in the process of its executor."""

from __future__ import annotations

import collections
import contextlib
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ray.exceptions import RayChannelTimeoutError

from vllm_ray_ascend.compiled_graph import read_backoff
from vllm_ray_ascend.compiled_graph.flow_control import AckRouter
from vllm_ray_ascend.compiled_graph.layout import PipelineLayout
from vllm_ray_ascend.compiled_graph.pp_communicator import HcclPPCommunicator
from vllm_ray_ascend.ipc.shared_memory import open_channel_semaphores, remove_files

_FAILURE_REPORT_S = 1.0
"""Seconds for which a worker's own failure report may arrive later than Ray's error."""
_OVERHEAD_BYTES = 16384
"""What Ray adds to a message, with the next stage's names of its tensors, at most."""


class FailureCallbacks(NamedTuple):
    """How a failed step asks the executor for its cause."""

    fail_late: Callable[[], Exception]
    """End the engine since a step takes too long, and return the error to raise."""
    wait_for_failure: Callable[[float], BaseException | None]
    """Return what has ended the engine, or ends it within so many seconds; None where nothing does."""


class StepFuture(Future):  # type: ignore[type-arg]
    """One execution of the graph. Its response is read when somebody asks for it, in that thread."""

    def __init__(self, dag: PipelineDag, limit_s: float) -> None:
        super().__init__()
        self._dag = dag
        self.deadline = time.monotonic() + limit_s
        self.references: list[Any] = []
        """Ray's references to the responses of the last stage's ranks."""
        self.object_ref: Any = None
        """Of the message, where that is in the object store: it has to live until the response is there."""

    def result(self, timeout: float | None = None) -> Any:
        """Return the last stage's response. ``timeout`` is ignored: the step has its own."""
        self._dag.read_results_until(self)
        return super().result()


class PipelineDag:
    """The stages of a pipeline as a Ray compiled graph, of which several executions are in flight.

    It is used by one thread, except for `cancel`. Ray's own monitor of a graph calls methods of the workers to end it,
    which their main threads, in vLLM's busy loop, would never answer: it is disabled. The executor supervises its
    workers itself, and they close their ends of the channels themselves.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        layout: PipelineLayout,
        max_in_flight: int,
        limit_s: float,
        failures: FailureCallbacks,
        ack_router: AckRouter | None = None,
    ) -> None:
        """Compile the graph over ``actors``, by rank, whose main threads must be free.

        ``max_in_flight``: executions that may be in flight; ``limit_s``: seconds of one; ``ack_router``: of a graph
        between nodes.
        """
        import ray
        from ray.dag import DAGContext

        self._max_bytes = int(DAGContext.get_current().buffer_size_bytes)
        self._limit_s, self._failures, self._ack_router = limit_s, failures, ack_router
        self._responding_rank = layout.stages[-1][0]
        self._steps: collections.deque[StepFuture] = collections.deque()
        self._cause: BaseException | None = None
        self._channels_open = False
        """Whether every end of every channel is open, which the first response shows: names are no longer needed."""
        read_backoff.install()
        ray.get([actor.prepare_graph.remote(self._max_bytes, ack_router is not None) for actor in actors])
        self._dag: Any = _build_dag(actors, layout, limit_s).experimental_compile(
            _submit_timeout=limit_s,
            _max_inflight_executions=max_in_flight + 1,
            _overlap_gpu_communication=False,
            _default_communicator=None,
        )
        self._dag._monitor._teardown_done = True
        self._dag.worker_task_refs = {}  # a response that fails would wait for all of them
        tasks = self._dag.actor_to_executable_tasks
        ray.get([actor.set_graph_tasks.remote(tasks[actor]) for actor in actors])

    def execute(self, scheduler_output: Any, grammar_output: Any) -> StepFuture:
        """Start a step. Raises what `cancel` was given, or the executor's error where the graph is full too long."""
        self._raise_if_cancelled()
        step = StepFuture(self, self._limit_s)
        message, step.object_ref = serialize(
            (scheduler_output, grammar_output, self._responding_rank, self._channels_open), self._max_bytes
        )
        router = self._ack_router
        if router is not None and not router.own_acks.wait_for_acks(router.first_stage_size, self._limit_s):
            raise self._failures.fail_late()
        try:
            step.references = self._dag.execute(message)
        except RayChannelTimeoutError as error:
            raise self._cause or self._failures.fail_late() from error
        except Exception as error:  # Ray raises several for a dead actor: the first failure is the cause
            raise self._cause or self._failures.wait_for_failure(_FAILURE_REPORT_S) or error from error
        self._steps.append(step)
        return step

    def read_results_until(self, step: StepFuture) -> None:
        """Read the responses up to that of ``step``, in the order of execution."""
        while not step.done():
            self._read_result(self._steps.popleft())

    def drain(self, limit_s: float | None = None) -> None:
        """Wait for all steps in flight; ``limit_s`` seconds at most, where the engine shuts down.

        Errors are raised by the steps' own `result`.
        """
        if limit_s is not None:
            deadline = time.monotonic() + limit_s
            self._failures = FailureCallbacks(
                lambda: TimeoutError("VRA-451: the step did not end before the engine was shut down"), lambda _: None
            )
            for step in self._steps:
                step.deadline = min(step.deadline, deadline)
        while self._steps:
            self._read_result(self._steps.popleft())

    def cancel(self, cause: BaseException) -> None:
        """End every read and write with ``cause``, now and later. May be called in any thread."""
        if self._cause is None:
            self._close_channels(cause)

    def close(self) -> None:
        """Close this end of the channels, and kill the actor that Ray has for it."""
        import ray

        if self._cause is None:
            self._close_channels(RuntimeError("VRA-452: the engine was shut down"))
        for step in self._steps:
            step.set_exception(self._cause)
        self._steps.clear()
        self._dag._is_teardown = True  # nothing is left for Ray to do when it shuts down
        if ray.is_initialized():
            actor = self._dag._proxy_actor
            with contextlib.suppress(Exception):  # whatever it is: at the end of Ray, the actor is gone anyway
                ray.kill(actor)

    def _read_result(self, step: StepFuture) -> None:
        """Read the response of the oldest step, which is ``step``."""
        try:
            self._raise_if_cancelled()
            left_s = max(0.0, step.deadline - time.monotonic())
            # All are read, though only one has a response: Ray keeps what nobody asks for.
            responses = [each.get(timeout=left_s) for each in step.references]
            if self._ack_router is not None:
                self._ack_router.ack_responses()
            step.set_result(pickle.loads(responses[0]))
            if not self._channels_open:
                self._channels_open = True
                remove_files(open_channel_semaphores())
        except RayChannelTimeoutError as error:
            step.set_exception(self._cause or _with_cause(self._failures.fail_late(), error))
        except Exception as error:  # noqa: BLE001  the caller that asks for the result raises it
            step.set_exception(self._cause or self._failures.wait_for_failure(_FAILURE_REPORT_S) or error)
        step.references, step.object_ref = [], None

    def _raise_if_cancelled(self) -> None:
        if self._cause is not None:
            raise self._cause

    def _close_channels(self, cause: BaseException) -> None:
        self._cause = cause
        if self._ack_router is not None:
            self._ack_router.own_acks.close(cause)
        for end in (self._dag._dag_submitter, self._dag._dag_output_fetcher):
            with contextlib.suppress(Exception):  # whatever a channel raises whose other end is gone
                end.close()


def _build_dag(actors: Sequence[Any], layout: PipelineLayout, limit_s: float) -> Any:
    """Return Ray's graph: a step's message goes to the first stage, and from stage to stage with the tensors."""
    from ray.dag import InputNode, MultiOutputNode

    pipelines = [[actors[rank] for rank in ranks] for ranks in layout.pipelines()]
    communicators = [HcclPPCommunicator(len(each), None, None, each, limit_s=limit_s) for each in pipelines]
    with InputNode() as message:
        nodes = [actors[rank].run_first_stage.bind(message) for rank in layout.stages[0]]
        for ranks in layout.stages[1:]:
            inputs = [
                node.with_tensor_transport(transport=communicator)
                for node, communicator in zip(nodes, communicators, strict=True)
            ]
            nodes = [actors[rank].run_next_stage.bind(each) for rank, each in zip(ranks, inputs, strict=True)]
        return MultiOutputNode(nodes)


def _with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def serialize(value: Any, max_bytes: int) -> tuple[bytes, Any]:
    """Return ``value`` as a message of at most ``max_bytes`` bytes, and what must be kept until the message is read.

    A larger value goes to Ray's object store, and the message has its reference.
    """
    message = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    if len(message) + _OVERHEAD_BYTES <= max_bytes:
        return message, None
    import ray

    reference = ray.put(message)
    return pickle.dumps(reference, pickle.HIGHEST_PROTOCOL), reference


def deserialize(message: bytes) -> Any:
    """Return the value of a message that `serialize` made."""
    import ray

    value = pickle.loads(message)
    return pickle.loads(ray.get(value)) if isinstance(value, ray.ObjectRef) else value
