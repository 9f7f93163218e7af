"""The worker of CompiledGraphExecutor: vLLM's calls in its main thread, steps in the thread of Ray's graph.

Never both simultaneously: the executor waits for the steps in flight before it calls anything else. Ray's loop has a
thread of its own, whose device is set first; streams are the device's default one in both threads.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vllm_ray_ascend.engine.process import gc_paused

with gc_paused():  # in a worker's process, these are what imports vLLM
    import torch
    from ray.exceptions import RayChannelError
    from ray.experimental.channel import ChannelContext
    from ray.experimental.channel.accelerator_context import AcceleratorContext
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.outputs import AsyncModelRunnerOutput

    from vllm_ray_ascend import patches
    from vllm_ray_ascend.accelerators.choose import current_accelerator
    from vllm_ray_ascend.compiled_graph import read_backoff
    from vllm_ray_ascend.compiled_graph.dag import deserialize
    from vllm_ray_ascend.compiled_graph.flow_control import ACK, AckTracker
    from vllm_ray_ascend.compiled_graph.pp_communicator import HcclPPCommunicator
    from vllm_ray_ascend.control.client import format_stack
    from vllm_ray_ascend.control.protocol import Extension
    from vllm_ray_ascend.executor.worker import RayAscendWorker, RayAscendWorkerProc
    from vllm_ray_ascend.ipc.shared_memory import open_channel_semaphores, remove_files
    from vllm_ray_ascend.log import get_logger
    from vllm_ray_ascend.ray_transport import accelerator_context
    from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_NO_RESPONSE = b"-"
"""Not empty: Ray sends a message of no bytes to no other node, and its reader waits for ever (2.60)."""
_READ_LIMIT_S = 1e6
"""Seconds for which a channel is read at a time. By default Ray starts a read again after 0.1 s, and loses a tensor of
which the metadata have arrived and the rest has not."""
_GROUP = "vllm.distributed.parallel_state.GroupCoordinator"
_PLACEHOLDER = "nothing"
"""Name of the one-element tensor that a step without tensors sends: a message with none would not wait for the reader
(ray_transport.accelerator_context)."""


class CompiledGraphWorker(RayAscendWorker):
    """RayAscendWorker, with a step as one method of a compiled graph: a mixin, as that is."""

    _tasks: list[Any]
    _tensor_proxy: PipelineTensorProxy | None
    _acks: AckTracker | None = None

    def prepare_graph(self, max_bytes: int, use_acks: bool) -> None:
        """Prepare for compilation: device and message size of Ray's channels, and the pipeline group's transfers.

        ``use_acks``: the graph is between nodes, and what is read is acknowledged.
        """
        from ray.dag import DAGContext

        read_backoff.install()
        self._acks = AckTracker() if use_acks else None
        self._tasks = []
        self._semaphores_removed = False
        self._step_lock = threading.Lock()
        self._current_step: tuple[int, float] | None = None
        context = DAGContext.get_current()
        context.read_iteration_timeout, context.buffer_size_bytes = _READ_LIMIT_S, max_bytes
        device = current_accelerator().torch_device(current_accelerator().current_device())
        set_channel_device(device)
        group = get_pp_group()
        self._is_last_stage = group.is_last_rank
        self._tensor_proxy = PipelineTensorProxy(group, torch.zeros(1, device=device)) if group.world_size > 1 else None

    def set_graph_tasks(self, tasks: list[Any]) -> None:
        """Take Ray's tasks of this worker, after compilation. Their channels are closed when the worker stops."""
        self._tasks = tasks
        for communicator in self._graph_communicators():
            communicator.set_failure_callback(self._report_failure)

    def run_first_stage(self, message: bytes) -> Any:
        """Run a step of the first stage, for Ray's loop; results are those of `_run_stage`."""
        return self._run_stage(message, None)

    def run_next_stage(self, received: tuple[bytes, dict[str, Any]]) -> Any:
        """Run a step of a later stage, with message and tensors that the stage before it returned."""
        return self._run_stage(*received)

    def shutdown(self) -> None:
        """Leave the graph, then shut down as RayAscendWorker."""
        self._leave_graph()
        super().shutdown()

    def _run_stage(self, message: bytes, tensors: dict[str, Any] | None) -> Any:
        """Return message and tensors for the next stage; of the last stage the response, which is on one rank only."""
        with self._track_step():
            scheduler_output, grammar_output, responding_rank, channels_open = deserialize(message)
            if channels_open and not self._semaphores_removed:
                self._semaphores_removed = True
                remove_files(open_channel_semaphores())
            if self._tensor_proxy is not None:
                self._tensor_proxy.set_incoming(tensors)
            output = self.worker.execute_model(scheduler_output)
            if not self._is_last_stage:
                assert self._tensor_proxy is not None
                return message, self._tensor_proxy.take_outgoing()
            if output is None:
                output = self.worker.sample_tokens(grammar_output)
            if isinstance(output, AsyncModelRunnerOutput):
                output = self._with_failure_report("get_output", output.get_output)()
            return pickle.dumps(output, pickle.HIGHEST_PROTOCOL) if self.rank == responding_rank else _NO_RESPONSE

    @contextmanager
    def _track_step(self) -> Iterator[None]:
        with self._step_lock:
            self._current_step = (threading.get_ident(), time.monotonic())
            if self._acks is not None:
                self._send_control(Extension(ACK))
            try:
                yield
            finally:  # also after an error, which Ray sends on
                if self._acks is not None:
                    self._acks.wait_for_acks(readers=1)
                self._current_step = None

    def _handle_extension(self, name: str) -> None:
        if name == ACK and self._acks is not None:
            self._acks.on_ack()

    def _leave_graph(self) -> None:
        """Close the channels, which ends Ray's loop after its present step, and wait for that and for pending sends."""
        if self._acks is not None:
            self._acks.close(RayChannelError("VRA-467: the engine shuts down"))
        communicators = self._graph_communicators()
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        limit_s = load().stop_grace_s
        unfinished = [communicator for communicator in communicators if not communicator.drain(limit_s)]
        step_ended = not hasattr(self, "_step_lock") or self._step_lock.acquire(timeout=limit_s)
        if unfinished or not step_ended:
            logger.warning("VRA-468: a step of the compiled graph did not end within %g s of the shutdown", limit_s)

    def _terminate(self, lost: bool) -> None:
        """Terminate as RayAscendWorker; also remove the names of channels that were not yet open at all ends."""
        remove_files(open_channel_semaphores())
        super()._terminate(lost)

    def _describe_activity(self) -> str:
        step = getattr(self, "_current_step", None)
        if step is not None:
            ident, since = step
            return f"in a step of the graph for {time.monotonic() - since:.1f} s at {format_stack(ident)}; main thread"
        transfers = [communicator.describe_transfer() for communicator in self._graph_communicators()]
        return "; ".join([*filter(None, transfers), super()._describe_activity()])

    def _graph_communicators(self) -> list[HcclPPCommunicator]:
        communicators = ChannelContext.get_current().communicators.values()
        return [each for each in communicators if isinstance(each, HcclPPCommunicator)]


class CompiledGraphWorkerProc(CompiledGraphWorker, RayAscendWorkerProc):
    """vLLM's worker for Ray, with our part for compiled graphs."""


class PipelineTensorProxy:
    """Replaces the transfers of vLLM's pipeline group: vLLM's own worker runs a step, and the graph sends the tensors.

    The group's `isend_tensor_dict` and `irecv_tensor_dict` are what vLLM's and vllm-ascend's workers call in 0.23 to
    0.33. Whole tensors are sent: vLLM's own transfers send each tensor parallel rank's share and gather them there.
    """

    def __init__(self, group: Any, placeholder: Any) -> None:
        """Replace the transfers of ``group``. ``placeholder``: the tensor that is sent where there is none."""
        self._placeholder = placeholder
        self._incoming: dict[str, Any] | None = None
        self._outgoing: dict[str, Any] = {}
        patches.apply(f"{_GROUP}.irecv_tensor_dict", self._receive_tensors, group)
        patches.apply(f"{_GROUP}.isend_tensor_dict", self._send_tensors, group)

    def set_incoming(self, tensors: dict[str, Any] | None) -> None:
        """Set what the worker will receive in the next step."""
        self._incoming = {name: tensor for name, tensor in (tensors or {}).items() if name != _PLACEHOLDER}
        self._outgoing = {}

    def take_outgoing(self) -> dict[str, Any]:
        """Return what the worker has sent in the last step, or the placeholder, and forget it."""
        outgoing, self._outgoing, self._incoming = self._outgoing, {}, None
        return outgoing or {_PLACEHOLDER: self._placeholder}

    def _receive_tensors(self, *_: Any, **__: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
        tensors, self._incoming = self._incoming, None
        if not tensors:
            raise RuntimeError(
                "VRA-469: this stage has a batch to compute and received no tensors for it: the stage before it had "
                "none. The stages' schedules differ; see the first error in the log of that stage's rank."
            )
        return tensors, [], []

    def _send_tensors(self, tensors: dict[str, Any], *_: Any, **__: Any) -> list[Any]:
        self._outgoing = dict(tensors)
        return []


class WorkerContext(AcceleratorContext):  # type: ignore[misc]  # Ray has no types
    """The device that vLLM's worker has open. Ray looks for it in lists that are not set under NOSET."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type, HcclPPCommunicator)
        self._device = device
        self._thread = threading.local()

    def get_accelerator_devices(self) -> list[torch.device]:
        """Return the one device."""
        return [self._device]

    def get_device_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Set the thread's device permanently: Ray's own context would set it back to number 0, another worker's."""
        if not getattr(self._thread, "is_bound", False):
            current_accelerator().bind_thread(self._device)
            self._thread.is_bound = True
        return nullcontext()

    @property
    def accelerator_count(self) -> int:
        """One: Ray rejects an actor that has none."""
        return 1


def set_channel_device(device: torch.device) -> None:
    """Have the channels of this process use ``device``. A tensor on another one goes through host memory."""
    accelerator_context.install()
    AcceleratorContext.set(WorkerContext(device))
    ChannelContext.get_current().set_torch_device(device)
