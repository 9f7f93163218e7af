"""The worker of CompiledGraphExecutor: vLLM's calls in its main thread, steps in the thread of Ray's graph.

Never both at once: the executor waits for the steps under way before it asks for anything else. Ray's loop has a thread
of its own, whose device is set first; streams are the device's default one in both threads.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ray.exceptions import RayChannelError
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.compiled_graph import patience
from vllm_ray_ascend.compiled_graph.carrier import Carrier
from vllm_ray_ascend.compiled_graph.context import use_device
from vllm_ray_ascend.compiled_graph.parcel import unpack
from vllm_ray_ascend.compiled_graph.receipts import Receipts
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
from vllm_ray_ascend.lifecycle.messages import HasRead
from vllm_ray_ascend.lifecycle.shared_memory import channels, remove
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load
from vllm_ray_ascend.transport.pipeline import HcclPPCommunicator

logger = get_logger(__name__)

_FRAMES = 4
_NO_ANSWER = b"-"
"""Not empty: Ray sends a message of no bytes to no other node, and its reader waits for ever (2.60)."""
_READ_S = 1e6
"""Seconds for which a channel is read at a time. Ray begins a read anew after 0.1 s, and forgets a tensor whose
metadata have come and the rest has not."""


class CompiledGraphWorkerProc(RayAscendWorkerProc):
    """RayAscendWorkerProc, with a step as one method of a compiled graph."""

    _tasks: list[Any]
    _carrier: Carrier | None
    _receipts: Receipts | None = None

    def prepare_graph(self, room: int, receipts: bool) -> None:
        """Before the graph is compiled: device and size of its channels, a pipeline group whose tensors it carries, and
        whether everyone says when it has read."""
        from ray.dag import DAGContext

        patience.install()
        self._receipts = Receipts() if receipts else None
        self._tasks = []
        self._names_dropped = False
        self._stepping = threading.Lock()
        self._step_since: tuple[int, float] | None = None
        context = DAGContext.get_current()
        context.read_iteration_timeout, context.buffer_size_bytes = _READ_S, room
        device = current().device(current().current_device())
        use_device(device)
        group = get_pp_group()
        self._first, self._last = group.is_first_rank, group.is_last_rank
        self._carrier = Carrier(group, torch.zeros(1, device=device)) if group.world_size > 1 else None

    def keep_tasks(self, tasks: list[Any]) -> None:
        """After it: Ray's tasks of this worker, whose channels it closes when it ends."""
        self._tasks = tasks
        for each in self._communicators():
            each.on_failure(self._fail)

    def graph_next(self, before: tuple[bytes, dict[str, Any]]) -> Any:
        """`graph_step` of a stage that is not the first, with what the one before it gave."""
        return self.graph_step(*before)

    def graph_step(self, message: bytes, tensors: dict[str, Any] | None = None) -> Any:
        """A step of this stage, for Ray's loop: message and tensors for the next one, of the last stage the answer,
        which says something on one rank only."""
        with self._step():
            scheduler_output, grammar_output, answering, all_open = unpack(message)
            if all_open and not self._names_dropped:
                self._names_dropped = True
                remove(channels())
            if self._carrier is not None:
                self._carrier.bring(tensors)
            output = self.worker.execute_model(scheduler_output)
            if not self._last:
                assert self._carrier is not None
                return message, self._carrier.take()
            if output is None:
                output = self.worker.sample_tokens(grammar_output)
            if isinstance(output, AsyncModelRunnerOutput):
                output = output.get_output()
            return pickle.dumps(output, pickle.HIGHEST_PROTOCOL) if self.rank == answering else _NO_ANSWER

    def shutdown(self) -> None:
        """Leave the graph, then as RayAscendWorkerProc."""
        self._leave_graph()
        super().shutdown()

    def _was_read(self) -> None:
        if self._receipts is not None:
            self._receipts.came()

    def _leave_graph(self) -> None:
        """Close the channels, which ends Ray's loop after its present step, and wait for that and for pending sends."""
        if self._receipts is not None:
            self._receipts.close(RayChannelError("the engine ends"))
        communicators = self._communicators()
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        limit_s = load().stop_grace_s
        late = [each for each in communicators if not each.settle(limit_s)]
        if hasattr(self, "_stepping") and not self._stepping.acquire(timeout=limit_s):
            late.append(self)
        if late:
            logger.warning("a step of the compiled graph was under way for more than %g s", limit_s)

    def _end(self, lost: bool) -> None:
        """As RayAscendWorkerProc, and channels that were not yet open everywhere leave no name."""
        remove(channels())
        super()._end(lost)

    def _communicators(self) -> list[HcclPPCommunicator]:
        from ray.experimental.channel import ChannelContext

        every = ChannelContext.get_current().communicators.values()
        return [each for each in every if isinstance(each, HcclPPCommunicator)]

    @contextmanager
    def _step(self) -> Iterator[None]:
        with self._stepping:
            self._step_since = (threading.get_ident(), time.monotonic())
            if self._receipts is not None:
                self._tell(HasRead())
            try:
                yield
            finally:  # Ray sends an error on as well
                if self._receipts is not None:
                    self._receipts.before_sending(readers=1)
                self._step_since = None

    def _activity(self) -> str:
        step = getattr(self, "_step_since", None)
        if step is not None:
            ident, since = step
            return f"in a step of the graph for {time.monotonic() - since:.1f} s at {_place(ident)}; main thread"
        doing = [each.doing() for each in self._communicators()]
        return "; ".join([*filter(None, doing), super()._activity()])


def _place(ident: int) -> str:
    """Where a thread is: its innermost frames, outermost first."""
    frame = sys._current_frames().get(ident)
    stack = traceback.extract_stack(frame)[-_FRAMES:] if frame is not None else []
    return " > ".join(f"{entry.filename.rpartition('/')[2]}:{entry.lineno} {entry.name}" for entry in stack)
