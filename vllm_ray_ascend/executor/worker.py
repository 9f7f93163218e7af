"""The worker of RayAscendExecutor, a Ray actor. Imported by name on every node."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.v1.executor import multiproc_executor
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.augment import platform_is_ours
from vllm_ray_ascend.compat.ascend import has_port_ranges
from vllm_ray_ascend.compat.rebind import replace, with_globals
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import physical_of_logical
from vllm_ray_ascend.devices.owners import check_assigned
from vllm_ray_ascend.devices.visible import VARIABLE, complaint, entries
from vllm_ray_ascend.engine.process import node_address, prepare_process
from vllm_ray_ascend.environment.ports import port_variables
from vllm_ray_ascend.errors import NotActiveError, VisibleDevicesError, VllmRayAscendError
from vllm_ray_ascend.executor.pairs import connect_pairs
from vllm_ray_ascend.executor.queues import CancellableQueue, drop_name, drop_names, files_of, socket_files
from vllm_ray_ascend.executor.settle import settle
from vllm_ray_ascend.graphs import hooks
from vllm_ray_ascend.lifecycle.deadlines import DEVICE, EXECUTE, HCCL, MODEL, STEPS, step_limits
from vllm_ray_ascend.lifecycle.lifeline import Lifeline
from vllm_ray_ascend.lifecycle.messages import Doing, Holds, Message, Segment
from vllm_ray_ascend.lifecycle.shared_memory import mapped, remove
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_START_STEPS = (
    "connect_pairs",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
"""What is asked while an engine starts: a failure is told at once, as in STEPS."""


class RayAscendWorkerProc(RayWorkerProc):
    """vLLM's worker for Ray, which refuses a node that cannot work and explains a start that failed."""

    def __init__(self, *args: Any, lifeline: str = "", **kwargs: Any) -> None:
        """As upstream's; ``lifeline`` says where the executor is."""
        if not platform_is_ours():
            raise NotActiveError(_not_active())
        super().__init__(*args, **kwargs)
        socket_files.update(files_of(self._init_kwargs["input_shm_handle"]))  # whose executor may be killed at any time
        self._stopping = False
        self._lifeline = self._connect(lifeline)

    def _connect(self, text: str) -> Lifeline | None:
        """The connection to the executor; without it the worker is watched by Ray alone."""
        if not text:
            return None
        rank: int = self._init_kwargs["rank"]
        try:
            return Lifeline(
                text,
                rank,
                node_address(),
                load().silence_s,
                on_stop=self._stop,
                on_end=self._end,
                activity=self._activity,
                on_read=self._was_read,
            )
        except OSError as error:
            logger.warning("rank %d on node %s cannot reach its executor at %s: %s", rank, node_address(), text, error)
            return None

    def _tell(self, message: Message) -> None:
        if self._lifeline is not None:
            self._lifeline.tell(message)

    def _fail(self, error: BaseException) -> None:
        """Tell the executor that this worker cannot go on, why, and what an error of the device means."""
        if self._lifeline is not None:
            own = isinstance(error, VllmRayAscendError)  # which say what to do by themselves
            self._lifeline.fail(error, None if own else current().explain(error))

    def _activity(self) -> str:
        queue = getattr(self, "rpc_broadcast_mq", None)
        if queue is None:
            return "starting"
        if not queue.working_on:
            return "waiting for work"
        return f"in {queue.working_on} for {time.monotonic() - queue.working_since:.1f} s"

    def _was_read(self) -> None:
        """What this worker sent last was read: for those who send by other ways than vLLM's queues."""

    def _stop(self) -> None:
        """Leave the busy loop after the present step; SystemExit is how an actor ends its process on purpose."""
        self._stopping = True
        queue = getattr(self, "rpc_broadcast_mq", None)
        if queue is None:  # still starting: there is no loop to leave
            self._end(lost=False)
        else:
            queue.cancel(SystemExit(0))

    def _end(self, lost: bool) -> None:
        """A sibling is gone, for which the main thread may be waiting in HCCL: end at once. With the executor ``lost``
        all siblings are there, and end in order: at once only where that takes too long.

        The executor's own shared memory is its to remove, unless it is lost.
        """
        queue = getattr(self, "rpc_broadcast_mq", None)
        if lost and queue is not None:
            remove(socket_files)  # at once: Ray kills an actor whose driver is gone
            remove(mapped())
            limit = threading.Timer(load().stop_grace_s, os._exit, (1,))
            limit.daemon = True
            limit.start()
            self._stop()
            return
        remove(socket_files)
        remove(mapped() - (set() if lost or queue is None else {queue.segment()}))
        os._exit(1)

    def _init_message_queues(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's queues, with reads that `_stop` can end, and shared memory that the executor knows of."""
        with_globals(super()._init_message_queues.__func__, MessageQueue=CancellableQueue)(self, *args, **kwargs)
        if (segment := self.worker_response_mq.segment()) is not None:
            for name in (segment, *files_of(self.worker_response_mq.handle)):
                self._tell(Segment(name))

    def run(self) -> None:
        """As upstream's; a step that fails in one rank ends the engine now, not when its siblings' HCCL gives up."""
        self.worker.connect_pairs = functools.partial(connect_pairs, self.worker)
        for name in (*STEPS, *_START_STEPS):
            if hasattr(self.worker, name):
                setattr(self.worker, name, self._reporting(name, getattr(self.worker, name)))
        super().run()

    def _reporting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def reporting(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                logger.exception("%s failed", name)
                self._fail(error)
                raise

        return reporting

    def shutdown(self) -> None:
        """After the busy loop: settle what is under way on the NPU, then vllm-ascend's groups, then as upstream."""
        if self._stopping:
            settle(self.worker)
        drop_name(self.worker_response_mq)
        remove(socket_files)
        super().shutdown()
        if self._stopping and self._lifeline is not None:
            self._lifeline.close()

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The node's id and the physical NPU that Ray assigned to this worker (vLLM 0.24 and later)."""
        return self._checked(super().get_node_and_physical_gpu_ids)

    def get_node_and_gpu_ids(self) -> tuple[str, list[int]]:
        """The same under the name that vLLM 0.23 has for it."""
        return self._checked(super().get_node_and_gpu_ids)

    def _checked(self, ask: Callable[[], tuple[str, list[int]]]) -> tuple[str, list[int]]:
        node_id, ids = ask()
        kind = current().kind
        listed = entries(os.environ.get(kind.variable))
        usable = None if listed is None else [int(entry) for entry in listed if entry.isdigit()]
        if kind is not NPU and usable is not None and len(usable) < len(listed or ()):
            usable = None  # a list of UUIDs: vLLM has translated what Ray assigned
        owner = f"rank {self._init_kwargs['rank']}"
        return node_id, check_assigned(owner, ids, envs.VLLM_RAY_PER_WORKER_GPUS, usable, node_address(), kind)

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Open the NPU and make the worker. Arguments are the parent's, which differ between vLLM 0.23 and 0.33.

        Raises VisibleDevicesError where a failure is that of the node's ASCEND_RT_VISIBLE_DEVICES.
        """
        given = inspect.signature(super().initialize_worker).bind(*args, **kwargs).arguments
        self._tell(Holds(_own_npu(given), current().kind.key))
        _prepare(given)
        drop_names()
        replace(multiproc_executor, "WorkerWrapperBase", announcing(self._tell))
        current().watch_captures()
        hooks.install()
        try:
            self._initialize(super().initialize_worker, *args, **kwargs)
        except Exception as error:
            self._fail(error)
            raise
        self._tell(Doing(""))

    def _initialize(self, initialize: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            initialize(*args, **kwargs)
        except Exception as error:
            if current().kind is not NPU:
                raise
            # Only now: asking before would fix the list before vLLM 0.23 has set it.
            reason = complaint(os.environ.get(VARIABLE), current().device_count())
            if reason is None:
                raise
            raise VisibleDevicesError(f"node {node_address()}: {reason}. {_REMEDY}") from error


def announcing(tell: Callable[[Message], None]) -> type[WorkerWrapperBase]:
    """vLLM's wrapper of a worker, which tells what it begins: the two long parts of a worker's start."""

    class Announcing(WorkerWrapperBase):
        def init_device(self) -> None:
            tell(Doing(DEVICE))
            super().init_device()

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            tell(Doing(MODEL))
            self.worker.load_model(*args, **kwargs)

    return Announcing


_REMEDY = (
    f"Stop Ray on that node (`ray stop`), set {VARIABLE} to NPUs that `npu-smi info` lists, or unset it, and start Ray "
    "there again: workers have the variable of their node's `ray start`."
)


def _prepare(given: dict[str, Any]) -> None:
    """Have this node's variables, not the driver's, before HCCL or gloo read them."""
    prepare_process()
    if current().kind is not NPU:
        return
    copied: dict[str, str] = given.get("driver_env_vars") or {}
    environ = {**copied, **os.environ}
    limits = step_limits(
        load(environ).hang_s, float(environ.get(EXECUTE) or envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), environ
    )
    if limits.hccl_s is not None:
        os.environ[HCCL] = str(limits.hccl_s)
    if load().node_env != "off":
        share = float(copied.get("VLLM_RAY_PER_WORKER_GPUS", envs.VLLM_RAY_PER_WORKER_GPUS))
        os.environ.update(port_variables(_own_npu(given), share, os.environ, ranges=has_port_ranges()))


def _own_npu(given: dict[str, Any]) -> int:
    """Physical NPU of this worker: of the engine's on this node (vLLM 0.23: a variable) the one at its local rank."""
    assigned = given.get("assigned_physical_gpu_ids") or entries(given["env_vars"].get(current().kind.variable)) or []
    return physical_of_logical([int(physical) for physical in assigned], given["local_rank"])


def _not_active() -> str:
    from vllm.platforms import current_platform

    return (
        f"node {node_address()}: vLLM's platform is {type(current_platform).__qualname__}, not the NPU platform with "
        f"vllm-ray-ascend, nor CUDA's with VLLM_RAY_ASCEND=1 (VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', 'unset')}). "
        "Install the same vllm-ascend and vllm-ray-ascend on that node, and start Ray there without VLLM_RAY_ASCEND=0, "
        "and without a VLLM_PLUGINS that lacks `ray_ascend`."
    )
