"""The worker of RayAscendExecutor, a Ray actor. Imported by name on every node."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.acl_graphs import hooks
from vllm_ray_ascend.compat.ascend import has_port_ranges
from vllm_ray_ascend.control.client import ControlClient, server_location
from vllm_ray_ascend.control.protocol import DeviceOpened, EventReported, IpcResource, Message, PhaseStarted
from vllm_ray_ascend.control.timeouts import DEVICE, MERGED_STEP, MODEL, STEPS, stop_grace_s
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import logical_to_physical
from vllm_ray_ascend.devices.owners import check_assigned_ids
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, split_entries, visibility_error
from vllm_ray_ascend.engine.adapters import check_adapter
from vllm_ray_ascend.engine.process import gc_paused, node_address, prepare_process
from vllm_ray_ascend.environment.node import read_first_port
from vllm_ray_ascend.environment.paths import missing_extension, missing_path
from vllm_ray_ascend.environment.ports import port_variables
from vllm_ray_ascend.errors import (
    NotActiveError,
    VisibleDevicesError,
    VllmRayAscendError,
    WorkerFailedError,
)
from vllm_ray_ascend.executor import memory_wait
from vllm_ray_ascend.executor.pipeline_warmup import connect_pipeline_pairs
from vllm_ray_ascend.ipc.shared_memory import mapped_segments, remove_files
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS
from vllm_ray_ascend.platform_patch import platform_is_ours
from vllm_ray_ascend.settings import load

with gc_paused():  # in a worker's process, these are what imports vLLM
    from vllm import envs
    from vllm.distributed import get_pp_group
    from vllm.v1.executor import ray_executor_v2
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc
    from vllm.v1.outputs import AsyncModelRunnerOutput
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_ray_ascend.ipc.message_queue import (
        CancellableQueue,
        record_segments,
        segments,
        socket_files,
        socket_paths,
        unlink_shared_memory,
        unlink_shared_memory_when_ready,
    )

logger = get_logger(__name__)

_STARTUP_STEPS = (
    "connect_pipeline_pairs",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
"""Calls while an engine starts: a failure is reported immediately, as in STEPS."""


if TYPE_CHECKING:
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc as _Mixin
else:
    _Mixin = object


class RayAscendWorker(_Mixin):
    """Our part of a worker for Ray: rejects a node that cannot work, explains a startup that failed, ends gracefully.

    A mixin before vLLM's RayWorkerProc, or before the class that somebody has put in its place (`actor_class`).
    """

    _location = "device unknown"

    def __init__(self, *args: Any, control_address: str = "", **kwargs: Any) -> None:
        """Take upstream's arguments, and ``control_address``: the address of the executor's control server, as JSON."""
        if not platform_is_ours():
            raise NotActiveError("VRA-324", _not_active_message())
        super().__init__(*args, **kwargs)
        # The executor, which created these sockets, may be killed at any time.
        socket_files.update(socket_paths(self._init_kwargs["input_shm_handle"]))
        self._stop_requested = False
        self._control = self._connect_control(control_address)
        if self._control is not None:
            EVENTS.forward = lambda event: self._send_control(EventReported(event.event, event.fields))

    def _connect_control(self, address_json: str) -> ControlClient | None:
        """Return the control connection to the executor; without one, Ray alone monitors this worker."""
        if not address_json:
            return None
        rank: int = self._init_kwargs["rank"]
        try:
            return ControlClient(
                address_json,
                rank,
                node_address(),
                load().silence_s,
                on_stop=self._request_stop,
                on_terminate=self._terminate,
                describe_activity=self._describe_activity,
                on_extension=self._handle_extension,
            )
        except OSError as error:
            logger.warning(
                "VRA-325: rank %d on node %s cannot connect to its executor at %s, so only Ray monitors it: %s. Allow "
                "TCP connections between the nodes.",
                rank,
                node_address(),
                server_location(address_json),
                error,
            )
            return None

    def _send_control(self, message: Message) -> None:
        if self._control is not None:
            self._control.send(message)

    def _report_failure(self, error: BaseException) -> None:
        """Report to the executor that this worker cannot continue, why, and what an error of the device means."""
        if self._control is not None:
            self._control.report_failure(error, _explain(error))

    def _describe_activity(self) -> str:
        queue = getattr(self, "rpc_broadcast_mq", None)
        if queue is None:
            return "starting"
        if late := queue.late_readers():
            return f"waiting until ranks {late} of its node have room for a message"
        if not queue.current_method:
            return "waiting for work"
        return f"in {queue.current_method} for {time.monotonic() - queue.method_started_at:.1f} s"

    def _handle_extension(self, name: str) -> None:
        """Handle an Extension of the control connection. For subclasses."""

    def _request_stop(self) -> None:
        """Leave the busy loop after the present step; by SystemExit an actor exits its process on purpose."""
        self._stop_requested = True
        requests, responses = (getattr(self, name, None) for name in ("rpc_broadcast_mq", "worker_response_mq"))
        if requests is None:  # still starting: there is no loop to leave
            self._terminate(lost=False)
            return
        requests.cancel(SystemExit(0))
        if responses is not None:  # an answer that nobody reads any more
            responses.cancel(SystemExit(0))

    def _terminate(self, lost: bool) -> None:
        """Exit immediately: a sibling is gone, for which the main thread may be waiting in HCCL.

        Where the executor is ``lost``, all siblings live: stop gracefully, and exit immediately only where that takes
        too long. The executor removes its own shared memory, unless it is lost.
        """
        queue = getattr(self, "rpc_broadcast_mq", None)
        if lost and queue is not None:
            remove_files(socket_files)  # immediately: Ray kills an actor whose driver is gone
            remove_files(mapped_segments() & segments)
            ranks: int = self._init_kwargs["vllm_config"].parallel_config.world_size
            limit = threading.Timer(stop_grace_s(load().stop_grace_s, ranks), os._exit, (1,))
            limit.daemon = True
            limit.start()
            self._request_stop()
            return
        remove_files(socket_files)
        remove_files(mapped_segments() & segments - (set() if lost or queue is None else {queue.segment_name()}))
        os._exit(1)

    def _init_message_queues(self, *args: Any, **kwargs: Any) -> None:
        """Create vLLM's queues, with reads that `_request_stop` can end; report their shared memory to the executor."""
        target = "vllm.v1.executor.ray_executor_v2.RayWorkerProc._init_message_queues"
        patches.with_globals(target, super()._init_message_queues, MessageQueue=CancellableQueue)(self, *args, **kwargs)
        if (segment := self.worker_response_mq.segment_name()) is not None:
            for name in (segment, *socket_paths(self.worker_response_mq.handle)):
                self._send_control(IpcResource(name))

    def run(self) -> None:
        """Run upstream's loop. A failed step is reported immediately, not once HCCL times out in the other ranks."""
        self.worker.connect_pipeline_pairs = functools.partial(connect_pipeline_pairs, self.worker)
        for name in (*STEPS, *_STARTUP_STEPS):
            if hasattr(self.worker, name) and name != MERGED_STEP:  # that calls the two others
                setattr(self.worker, name, self._with_failure_report(name, getattr(self.worker, name)))
        self._with_failure_report("the worker's loop", super().run)()

    def async_output_busy_loop(self) -> None:
        """Run upstream's thread, whose end nobody else notices: this rank would answer nothing more."""
        self._with_failure_report("the thread of asynchronous responses", super().async_output_busy_loop)()

    def enqueue_output(self, output: Any) -> None:
        """Send a response as upstream; an error with rank, node, device and meaning.

        Under asynchronous scheduling it is here that a step's errors of the device surface, in a thread of upstream's.
        """
        if isinstance(output, AsyncModelRunnerOutput):
            output = self._wait_for_output(output)
        super().enqueue_output(self._locate_error(output) if isinstance(output, Exception) else output)

    def _wait_for_output(self, output: AsyncModelRunnerOutput) -> Any:
        """Return a step's result once the device has computed it, or its error, which is reported."""
        try:
            return self._with_failure_report("get_output", output.get_output)()
        except Exception as error:  # noqa: BLE001  whatever it is, it is the response to the executor
            return error

    def _locate_error(self, error: Exception) -> WorkerFailedError:
        """Return the error of a call as the executor gets it."""
        text = f"rank {self.rank} ({self._location}): {type(error).__name__}: {error}"
        return WorkerFailedError("VRA-370", "\n".join(filter(None, (text, _explain(error)))))

    def _with_failure_report(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_report(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:  # whatever it is, the executor is to know before the siblings fail of it
                logger.exception("VRA-326: %s failed", name)
                self._report_failure(error)
                raise

        return call_and_report

    def shutdown(self) -> None:
        """Shut down after the busy loop: `quiesce` the NPU and leave vllm-ascend's groups, then as upstream."""
        if self._stop_requested:
            quiesce(self.worker)
        unlink_shared_memory(self.worker_response_mq)
        remove_files(socket_files)
        super().shutdown()
        if self._stop_requested and self._control is not None:
            self._control.close()

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Return the node's id and the physical NPU that Ray assigned to this worker (vLLM 0.24 and later)."""
        return self._check_assignment(super().get_node_and_physical_gpu_ids)

    def get_node_and_gpu_ids(self) -> tuple[str, list[int]]:
        """Return the same, under the method's name in vLLM 0.23."""
        return self._check_assignment(super().get_node_and_gpu_ids)

    def _check_assignment(self, get_assignment: Callable[[], tuple[str, list[int]]]) -> tuple[str, list[int]]:
        node_id, ids = get_assignment()
        kind = current_accelerator().kind
        listed = split_entries(os.environ.get(kind.variable))
        usable = None if listed is None else [int(entry) for entry in listed if entry.isdigit()]
        if kind is not NPU and usable is not None and len(usable) < len(listed or ()):
            usable = None  # a list of UUIDs: vLLM has translated those that Ray assigned
        owner = f"rank {self._init_kwargs['rank']}"
        return node_id, check_assigned_ids(owner, ids, envs.VLLM_RAY_PER_WORKER_GPUS, usable, node_address(), kind)

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Open the NPU and create the worker. Arguments are the parent's, which differ between vLLM 0.23 and 0.33.

        Raises VisibleDevicesError where the node's ASCEND_RT_VISIBLE_DEVICES is the cause of a failure.
        """
        upstream: Any = patches.upstream_class(ray_executor_v2.__name__, type(self))
        given = inspect.signature(upstream.initialize_worker).bind(self, *args, **kwargs).arguments
        physical, kind = _physical_device(given), current_accelerator().kind
        self._location = f"node {node_address()}, physical {kind.key} {physical}"
        self._send_control(DeviceOpened(physical, kind.key))
        _prepare_environment(given)
        record_segments()
        unlink_shared_memory_when_ready()
        wrapper = phase_reporting_wrapper(self._send_control)
        patches.apply("vllm.v1.executor.multiproc_executor.WorkerWrapperBase", wrapper)
        current_accelerator().watch_captures()
        patches.wrap("vllm.envs.compile_factors", _with_device_index)
        hooks.install()
        memory_wait.install()
        try:
            self._call_initialize(super().initialize_worker, *args, **kwargs)
        except Exception as error:  # whatever it is, it is the reason why the engine does not start
            self._report_failure(error)
            raise
        self._send_control(PhaseStarted(""))

    def _call_initialize(self, initialize: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            initialize(*args, **kwargs)
        except Exception as error:  # torch_npu, CANN and vLLM each raise others for a wrong list or path
            config = self._init_kwargs["vllm_config"]
            if reason := missing_path(config.model_config.model, node_address()):
                raise WorkerFailedError("VRA-357", reason) from error
            if reason := missing_extension(config.parallel_config.worker_extension_cls, error, node_address()):
                raise WorkerFailedError("VRA-393", reason) from error
            if current_accelerator().kind is not NPU:
                raise
            # Only now: counting devices earlier would fix the list before vLLM 0.23 has set it.
            reason = visibility_error(os.environ.get(VISIBLE_DEVICES), current_accelerator().device_count())
            if reason is None:
                raise
            raise VisibleDevicesError("VRA-327", f"node {node_address()}: {reason}. {_REMEDY}") from error


class RayAscendWorkerProc(RayAscendWorker, RayWorkerProc):
    """vLLM's worker for Ray, with our part."""


def actor_class(worker_class: type) -> type:
    """Return ``worker_class``, or its like on top of the class that somebody has put in RayWorkerProc's place.

    Ray pickles such a class by value, as it does for vLLM's executor: each worker has it, whatever its module holds.
    """
    found: type = ray_executor_v2.RayWorkerProc
    if patches.is_upstream_class(ray_executor_v2.__name__, found):
        return worker_class
    if issubclass(found, RayAscendWorker):
        return found
    logger.info("Workers are %s on top of %s.%s", worker_class.__name__, found.__module__, found.__qualname__)
    return type(worker_class.__name__, (worker_class.__bases__[0], found), {"__module__": worker_class.__module__})


def phase_reporting_wrapper(send: Callable[[Message], None]) -> type[WorkerWrapperBase]:
    """Return vLLM's wrapper of a worker, which reports the two long phases of a worker's startup as they begin."""

    class PhaseReportingWrapper(WorkerWrapperBase):
        def init_worker(self, *args: Any, **kwargs: Any) -> None:
            """Import and create vLLM's worker; later collections, such as memory profiling makes, skip all of it."""
            with gc_paused():
                super().init_worker(*args, **kwargs)
            gc.freeze()

        def init_device(self) -> None:
            send(PhaseStarted(DEVICE))
            super().init_device()

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            send(PhaseStarted(MODEL))
            self.worker.load_model(*args, **kwargs)

        def elastic_ep_execute(self, execute_method: str, *args: Any, **kwargs: Any) -> Any:
            if execute_method == "load_model":  # how a worker that elastic scaling adds loads its model
                send(PhaseStarted(MODEL))
            return self.worker.elastic_ep_execute(execute_method, *args, **kwargs)

        def execute_model_and_sample_tokens(self, scheduler_output: Any, grammar_output: Any) -> Any:
            """Run both methods of a step as vLLM's engine core calls them (executor/worker_calls.py)."""
            output = self.execute_model(scheduler_output)
            if output is not None and get_pp_group().is_last_rank:  # of a worker that samples by itself
                return output
            return self.sample_tokens(grammar_output)

        def check_adapter(self, name: str, path: str) -> None:
            """Raise AdapterError where this node does not have the files of a LoRA adapter (engine/adapters.py)."""
            check_adapter(name, path, node_address())

    return PhaseReportingWrapper


_REMEDY = (
    f"Stop Ray on that node (`ray stop`), set {VISIBLE_DEVICES} to NPUs that `npu-smi info` lists, or unset it, and "
    "start Ray there again: workers inherit the variable of their node's `ray start`."
)


def _prepare_environment(given: dict[str, Any]) -> None:
    """Set this node's variables, not the driver's, before HCCL or gloo read them."""
    prepare_process()
    if current_accelerator().kind is not NPU:
        return
    copied: dict[str, str] = given.get("driver_env_vars") or {}
    if load().node_env != "off":
        share = float(copied.get("VLLM_RAY_PER_WORKER_GPUS", envs.VLLM_RAY_PER_WORKER_GPUS))
        physical_id, first_port = _physical_device(given), read_first_port()
        os.environ.update(
            port_variables(physical_id, share, os.environ, ranges=has_port_ranges(), first_port=first_port)
        )


def _with_device_index(compile_factors: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    """Return `compile_factors`, with the index of this worker's device: what torch compiles is for that alone.

    vLLM keeps compiled code by rank. On Ray a rank may have another device of its node the next time.
    """

    @functools.wraps(compile_factors)
    def factors_and_index() -> dict[str, object]:
        return {**compile_factors(), "vllm_ray_ascend_visible_index": current_accelerator().get_opened_device()}

    return factors_and_index


def _physical_device(given: dict[str, Any]) -> int:
    """Return the physical number of this worker's device: of the engine's on this node, that of its local rank."""
    assigned = given.get("assigned_physical_gpu_ids")
    if not assigned:  # vLLM 0.23 has a variable instead
        assigned = split_entries(given["env_vars"].get(current_accelerator().kind.variable)) or []
    return logical_to_physical([int(physical) for physical in assigned], given["local_rank"])


def _explain(error: BaseException) -> str | None:
    """Return what an error of the device means; None where that is unknown. Our own errors contain their remedy."""
    return None if isinstance(error, VllmRayAscendError) else current_accelerator().explain_error(error)


def _not_active_message() -> str:
    from vllm.platforms import current_platform

    return (
        f"node {node_address()}: vLLM's platform is {type(current_platform).__qualname__}, not the NPU platform with "
        f"vllm-ray-ascend, nor CUDA's with VLLM_RAY_ASCEND=1 (VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', 'unset')}). "
        "Install the same vllm-ascend and vllm-ray-ascend on that node, and start Ray there without VLLM_RAY_ASCEND=0, "
        "and without a VLLM_PLUGINS that lacks `ray_ascend`."
    )


def quiesce(worker: Any) -> None:
    """Wait for pending pipeline sends, then for the device, then release graphs and leave the platform's own groups.

    A send's buffer must live until it is done, a graph until it has run, and a group until nothing uses it. A step that
    fails is logged: the process exits all the same.
    """
    for step in (_wait_for_sends, _synchronize_device, _release_graphs, _leave_platform_groups):
        try:
            step(worker)
        except Exception as error:  # noqa: BLE001  whatever it is, the following steps are still needed
            logger.warning("VRA-328: %s failed while the worker shut down: %s", step.__name__.strip("_"), error)


def _wait_for_sends(worker: Any) -> None:
    for handle in worker.worker._pp_send_work or []:
        handle.wait()


def _synchronize_device(_: Any) -> None:
    current_accelerator().synchronize()


def _release_graphs(worker: Any) -> None:
    current_accelerator().release_graphs(getattr(worker.worker, "model_runner", None))


def _leave_platform_groups(_: Any) -> None:
    current_accelerator().destroy_platform_groups()
