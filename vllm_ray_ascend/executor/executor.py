"""The executor behind `--distributed-executor-backend ray`. Imported late: it needs vLLM and Ray."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import (
    WORKER_SPECIFIC_ENV_VARS,
    build_actor_name,
    get_bundles_for_indices,
    initialize_ray_cluster,
)

from vllm_ray_ascend import __version__, patches
from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.cluster.placement_groups import remove_placement_groups
from vllm_ray_ascend.cluster.registry import EngineRecord, ignored_list_warning, publish_record, remove_record
from vllm_ray_ascend.compat.versions import stack
from vllm_ray_ascend.control.timeouts import PAIRS, STEPS, is_commit, step_limit_s
from vllm_ray_ascend.engine import fault_tolerance
from vllm_ray_ascend.engine.metrics import report_values
from vllm_ray_ascend.engine.process import driver_settings_value, node_id, node_local_variables, skip_final_gc
from vllm_ray_ascend.engine.rank_recovery import steps_together
from vllm_ray_ascend.engine.shutdown import exit_with_parent
from vllm_ray_ascend.environment.paths import absolute_if_here
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, NICENESS, early_variables
from vllm_ray_ascend.errors import AdapterError, VllmRayAscendError, WorkerFailedError, WorkerLateError
from vllm_ray_ascend.executor.diagnostics import hung_message
from vllm_ray_ascend.executor.placement_group import (
    create_placement_group,
    has_lost_pinned_bundles,
    rank_bundles,
    take_share_of_bundles,
)
from vllm_ray_ascend.executor.rank_report import (
    RankReport,
    check_owners,
    create_engine_record,
    format_ready_line,
    report_rank,
)
from vllm_ray_ascend.executor.recovery import Recovery, check_recoverable
from vllm_ray_ascend.executor.startup import StartupRayProxy
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor, run_each
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc, actor_class
from vllm_ray_ascend.executor.worker_calls import MergedStepExecutor
from vllm_ray_ascend.ipc.message_queue import ExecutorQueues, message_queues, ranks_of_other_nodes, ranks_on_node
from vllm_ray_ascend.ipc.shared_memory import check_space, free_space
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import (
    ENGINE_READY,
    EVENTS,
    WORKERS_RESTARTED,
    WORKERS_RESTARTING,
    engine_name,
)
from vllm_ray_ascend.observability.metrics import (
    COUNTERS,
    RANK_INFO,
    RESTART_TIME,
    RESTARTS,
    VALUES,
    WRITE_TIME,
    WRITES,
)
from vllm_ray_ascend.observability.ray_events import list_in_ray
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_RANK_REPORT_LIMIT_S = 60.0
_FAILURE_REPORT_S = 2.0
"""A worker's response may arrive before its failure report does."""
_QUEUE_CHUNKS = 10
"""Chunks of vLLM's queue to the workers, `max_chunks` of MessageQueue."""


def startup_phase(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for the executor's methods that vLLM calls between its creation and the first request.

    The method is timed and limited as the phase ``name``. Where it fails, nobody else stops the workers, and a driver
    that continues would keep them: the executor is shut down, and the first failure is raised.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run_phase(self: RayAscendExecutor, *args: Any, **kwargs: Any) -> Any:
            try:
                with self._startup.track_phase(name):
                    return method(self, *args, **kwargs)
            except BaseException as error:  # Ctrl-C too: no worker may stay
                self._abort_startup(error)
                raise

        return run_phase

    return decorate


_UpstreamExecutor: Any = patches.upstream_class("vllm.v1.executor.ray_executor_v2", RayExecutorV2)


class ReboundStartup(_UpstreamExecutor):
    """vLLM's own startup with our globals: below the class that somebody has put in RayExecutorV2's place, if any."""

    _startup_target = "vllm.v1.executor.ray_executor_v2.RayExecutorV2._init_executor"
    _startup_reached = False

    def _init_executor(self) -> None:
        self._startup_reached = True
        start = patches.with_globals(self._startup_target, super()._init_executor, **self._startup_globals())
        start(self)

    def _startup_globals(self) -> dict[str, Any]:
        """Return what vLLM's startup finds instead of its module's globals."""
        raise NotImplementedError


class RayAscendExecutor(MergedStepExecutor, ReboundStartup):
    """vLLM's RayExecutorV2 on NPUs: upstream's startup, with our worker, our checks and our selection of variables."""

    _worker_class: type[RayAscendWorkerProc] = RayAscendWorkerProc
    ranks: list[RankReport]
    ray_worker_handles: list[Any]
    _rank_bundles: list[Any]
    """Index, node id and address of each rank's bundle."""

    def _init_executor(self) -> None:
        skip_final_gc()
        exit_with_parent(self.parallel_config.world_size)
        self._own_group: Any = None
        self._record: EngineRecord | None = None
        self._recovery = _create_recovery(self.vllm_config)
        _observe_engine(self.vllm_config)
        started = time.monotonic()
        self._start_engine()
        nodes = len({rank.node_id or rank.address for rank in self.ranks})
        EVENTS.emit(ENGINE_READY, ranks=len(self.ranks), nodes=nodes, seconds=time.monotonic() - started)

    def _start_engine(self) -> None:
        settings = load()
        self._hang_s, self._held_step = _step_limit_s(), None
        self._supervisor = WorkerSupervisor(
            lambda: self.ray_worker_handles,
            settings,
            self._hang_s,
            processes=self.parallel_config.world_size,
            socket_folder=envs.VLLM_RPC_BASE_PATH,
            mark_failed=self._mark_failed,
            on_failure=self._handle_failure,
        )
        self._startup = StartupRayProxy(self._supervisor, settings, before_run=self._before_run)
        try:
            self._start_workers()
        except BaseException as error:  # Ctrl-C too: no worker may stay
            self._abort_startup(error)
            raise
        logger.info("%s", format_ready_line(__version__, stack(), self.ranks))

    def _before_run(self) -> None:
        """Prepare what needs the workers' main threads, before these enter vLLM's busy loop. For subclasses."""

    def _abort_startup(self, error: BaseException) -> None:
        """Shut down, and raise the first failure of a worker where ``error`` only follows from it."""
        self.shutdown()
        if self._supervisor.cause not in (None, error):
            raise self._supervisor.cause from error

    def _start_workers(self) -> None:
        self._startup_reached = False
        take_share_of_bundles(self.parallel_config)
        super()._init_executor()
        if not self._startup_reached:
            raise patches.bypassed_error(self._startup_target, super()._init_executor, self._startup_globals())
        self.ranks = self.collective_rpc(report_rank, timeout=_RANK_REPORT_LIMIT_S)
        self._register_engine()
        if self.parallel_config.pipeline_parallel_size > 1:
            with self._startup.track_phase(PAIRS):
                self.collective_rpc("connect_pipeline_pairs")

    @startup_phase("KV cache layout")
    def get_kv_cache_specs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the workers' KV cache specs, as upstream."""
        return super().get_kv_cache_specs(*args, **kwargs)

    @startup_phase("profile run")
    def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
        """Return the bytes that each worker has for its KV cache, as upstream."""
        return super().determine_available_memory(*args, **kwargs)

    @startup_phase("KV cache")
    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Create the KV caches, as upstream."""
        return super().initialize_from_config(*args, **kwargs)

    if hasattr(RayExecutorV2, "compile_or_warm_up_model"):  # vLLM 0.28 and later; before, part of the phase above

        @startup_phase("graphs and warm-up")
        def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
            """Capture graphs and warm up, as upstream."""
            return super().compile_or_warm_up_model(*args, **kwargs)

    def _startup_globals(self) -> dict[str, Any]:
        return {
            "ray": self._startup,
            "RayWorkerProc": actor_class(self._worker_class),
            "WORKER_SPECIFIC_ENV_VARS": WORKER_SPECIFIC_ENV_VARS | node_local_variables(),
            "initialize_ray_cluster": self._initialize_ray_cluster,
            "MessageQueue": ExecutorQueues(
                self._hang_s,
                self._get_local_ranks,
                lambda: self._startup.check_queues_ready(range(self.world_size)),
                lambda: ranks_of_other_nodes(self._rank_bundles, node_id()),
                _count_write,
            ),
            "build_actor_name": self._build_actor_name,
            "get_bundles_sorted_by_node": self._get_rank_bundles,
            "get_bundles_for_indices": self._get_chosen_bundles,
        }

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of all workers, as upstream; phases of the startup and steps have a limit.

        After the limit the error says what each rank is doing.
        """
        self._supervisor.raise_if_failed()
        if self._recovery is not None:
            self._recovery.record_call(method, args, kwargs)
        if self._held_step is not None:
            method = self._take_held_step(method, kwargs)
        call, phase = super().collective_rpc, self._startup.current_phase
        if phase or is_commit(method, kwargs.get("args", ())):
            limit_s = self._startup.limit_s(phase)
        elif method in STEPS:
            limit_s = self._hang_s
        else:
            return self._supervisor.health_check.track(lambda: call(method, timeout, *args, **kwargs))
        if timeout is not None and (limit_s is None or timeout < limit_s):
            limit_s = timeout
        fail = functools.partial(self._fail_call, method, phase, limit_s or 0.0)

        def call_limited() -> Any:
            try:
                return call(method, limit_s, *args, **kwargs)
            except Exception as error:  # whatever it is: a failed worker may be its cause
                cause = fail(error)
                if cause is None or cause is error:
                    raise
                raise cause from error

        return self._supervisor.health_check.track(call_limited, fail)

    def add_lora(self, lora_request: Any) -> Any:
        """Load an adapter in all workers, as upstream; a relative path is that of this process.

        Raises AdapterError where a node lacks it. By upstream's text with the path as given vLLM's server answers 404.
        """
        given = lora_request.lora_path
        path = lora_request.lora_path = absolute_if_here(given)
        try:
            return super().add_lora(lora_request)
        except RuntimeError as error:
            if f"No adapter found for {path}" not in str(error):
                raise
            text = str(error).replace(path, given)
            raise AdapterError(
                "VRA-380",
                f"{text}. LoRA adapter {lora_request.lora_name} has to be at {path} on every node: copy "
                "or mount it there, or load it by its name on a hub.",
            ) from error

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Run a step, as upstream; relative paths of adapters are those of this process."""
        for request in scheduler_output.scheduled_new_reqs if self.lora_config else ():
            if request.lora_request is not None:
                request.lora_request.lora_path = absolute_if_here(request.lora_request.lora_path)
        return super().execute_model(scheduler_output, non_block)

    def _fail_call(self, method: object, phase: str, limit_s: float, error: BaseException) -> VllmRayAscendError | None:
        """End the engine, a call of whose startup or steps has failed, before anybody sees the error.

        Return the first failure: the worker's own report, with its rank, or where none comes, one of ``error``. None
        where the engine is stopping anyway.
        """
        if isinstance(error, TimeoutError):
            return self._fail_late(str(method), phase, limit_s)
        if self._supervisor.wait_for_failure(_FAILURE_REPORT_S) is None:
            self._supervisor.fail(WorkerFailedError("VRA-371", f"{method} failed: {error}"))
        return self.cause

    def _fail_late(self, method: str, phase: str, limit_s: float) -> WorkerLateError:
        """End the engine, whose workers are late or hang, and return the error that says so."""
        if phase:
            ranks = [worker.rank for worker in self._supervisor.connected_workers()]
            error = self._startup.late_error(phase, limit_s, ranks)
        else:
            error = WorkerLateError("VRA-309", hung_message(method, limit_s, self._supervisor.request_reports()))
        self._supervisor.fail(error)
        return error

    def _build_runtime_env(self) -> dict[str, Any]:
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        variables = runtime_env.setdefault("env_vars", {})
        for name, value in early_variables().items():
            variables.setdefault(name, value)
        variables.setdefault(DRIVER_VARIABLE, driver_settings_value())
        variables.setdefault(NICENESS, os.environ.get(NICENESS, "0"))
        return runtime_env

    def cancel_waits(self, cause: BaseException) -> None:
        """End every wait for a response of the workers with ``cause``. Called in the thread that detected it."""
        run_each(*(functools.partial(queue.cancel, cause) for queue in message_queues(self)))

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Monitor the workers by their control connections, and by Ray where one has none. Upstream polls Ray only."""
        self._supervisor.start_monitoring(inline)

    def _mark_failed(self) -> None:
        self.is_failed = self.shutting_down = True  # both, before the callback, as upstream's monitor does

    def _handle_failure(self, cause: VllmRayAscendError) -> None:
        """Notify whoever waits for the workers, and vLLM's engine core."""
        callback, self.failure_callback = getattr(self, "failure_callback", None), None
        run_each(lambda: self.cancel_waits(cause), lambda: callback and callback())

    @property
    def cause(self) -> VllmRayAscendError | None:
        """The first failure of a worker; None where there is none."""
        return self._supervisor.cause

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Register a callback for the first failure, as upstream, and keep it for the workers of a restart."""
        self._registered_callback = callback
        super().register_failure_callback(callback)

    def can_restart(self, limit_s: float = 0.0) -> bool:
        """Return whether a worker has failed, within ``limit_s`` seconds from now, and `restart` may be called."""
        if self._recovery is None or not self._recovery.restarts_workers:
            return False
        if (cause := self._supervisor.wait_for_failure(limit_s)) is None:
            return False
        if obstacle := self._recovery.restart_obstacle(cause):
            logger.error("VRA-310: the workers are not restarted: %s", obstacle)
        return not obstacle

    def restart(self) -> None:
        """Replace all workers after a failure, in the same bundles, and make the new ones ready as the old ones were.

        Raises what ends their startup.
        """
        recovery = self._recovery
        assert recovery is not None
        started = time.monotonic()
        group, self._own_group = self._own_group, None
        self.shutdown()
        self._finalizer.detach()
        recovery.restarts.append(started)
        self._own_group = group
        number = len(recovery.restarts)
        logger.warning("VRA-311: restarting all workers (restart %d of this engine)", number)
        VALUES.add(RESTARTS)
        EVENTS.emit(WORKERS_RESTARTING, restart=number)
        self._start_engine()
        super().register_failure_callback(self._registered_callback)
        calls, recovery.calls = recovery.calls, []
        for call in calls:
            with self._startup.track_phase(call.method):
                self.collective_rpc(call.method, None, *call.args, **call.kwargs)
        seconds = time.monotonic() - started
        logger.warning("VRA-312: all workers were restarted in %.1f s", seconds)
        VALUES.set(RESTART_TIME, seconds)
        EVENTS.emit(WORKERS_RESTARTED, restart=number, seconds=seconds)

    def shutdown(self) -> None:
        """Stop the workers gracefully, kill the rest as upstream does, leave the registry, remove our placement group.

        Where Ray is shut down already, as when the interpreter exits, its actors are gone: a call to Ray would make it
        connect to the cluster again.
        """
        import ray

        if getattr(self, "_supervisor", None) is not None and self._supervisor.stop_workers():
            self.shutting_down = False  # a failure has set it, and upstream's part is still to come
        if not ray.is_initialized():
            self.ray_worker_handles = []
        queues = message_queues(self)
        super().shutdown()
        for queue in queues:
            queue.close()
        if getattr(self.parallel_config, "assigned_physical_gpu_ids", None) is not None:
            self.parallel_config.assigned_physical_gpu_ids = None  # Ray's choice for these workers, not the user's
        record, self._record = getattr(self, "_record", None), None
        group, self._own_group = getattr(self, "_own_group", None), None
        if not ray.is_initialized():
            return
        if record is not None:
            remove_record(record)
        if group is not None:
            remove_placement_groups([group])
            self.parallel_config.placement_group = None

    def _initialize_ray_cluster(self, parallel_config: Any, ray_address: str | None = None, **options: Any) -> None:
        """Call vLLM's function, after our checks and with our placement group: vLLM then creates and waits for none."""
        if warning := check_space(*free_space(), envs.VLLM_MQ_MAX_CHUNK_BYTES_MB * 2**20 * _QUEUE_CHUNKS):
            logger.warning("%s", warning)
        if self._own_group is None:
            self._own_group = create_placement_group(self.vllm_config, ray_address)
        elif has_lost_pinned_bundles(self._own_group):  # of a restart: Ray places again only what is not pinned
            remove_placement_groups([self._own_group])
            self._own_group = parallel_config.placement_group = None
            wait_s = load().worker_limit_s or math.inf
            self._own_group = create_placement_group(self.vllm_config, ray_address, wait_s)
        initialize_ray_cluster(parallel_config, ray_address, **options)

    def _get_rank_bundles(self, placement_group: Any) -> list[Any]:
        """Return as many bundles as there are ranks, whole tensor parallel groups on a node where that is possible."""
        self._rank_bundles = rank_bundles(placement_group, self.parallel_config)
        return self._rank_bundles

    def _get_chosen_bundles(self, placement_group: Any, indices: list[int], world_size: int) -> list[Any]:
        """Return the bundles of VLLM_RAY_BUNDLE_INDICES in the user's order, as vLLM, and remember them."""
        self._rank_bundles = get_bundles_for_indices(placement_group, indices, world_size)
        return self._rank_bundles

    def _get_local_ranks(self) -> list[int]:
        """Return the ranks on this node: those to which messages go through shared memory."""
        return ranks_on_node(self._rank_bundles, node_id())

    def _build_actor_name(self, instance_id: str, *sizes: int) -> str:
        """Return vLLM's name of a worker, made unique among data parallel engines in one Ray namespace."""
        dp_rank = self.parallel_config.data_parallel_index
        suffix = f"_dp{dp_rank}"
        if dp_rank and not instance_id.endswith(suffix):
            instance_id += suffix
        if self._recovery is not None and self._recovery.restarts:
            instance_id += f"_restart{len(self._recovery.restarts)}"
        name: str = build_actor_name(instance_id, *sizes)
        return name

    def _register_engine(self) -> None:
        record = create_engine_record(self)
        check_owners(record)
        self._record = record
        VALUES.set_info(RANK_INFO, ((str(rank.rank), rank.address, str(rank.physical_id)) for rank in record.ranks))
        publish_record(record)
        kind = current_accelerator().kind
        if warning := ignored_list_warning(
            os.environ.get(kind.variable), record.address, [record], kind, record.node_id
        ):
            logger.warning("%s", warning)


def _create_recovery(vllm_config: Any) -> Recovery | None:
    """Return what restarts need, and install it in vLLM's engine core; None where the user does not want restarts."""
    if load().recover == "0":
        return None
    check_recoverable(vllm_config)
    if steps_together(vllm_config):  # engine/rank_recovery.py restarts all of them
        return Recovery(restarts_workers=False)
    from vllm_ray_ascend.engine.recovery import install

    install()
    return Recovery()


def _observe_engine(vllm_config: Any) -> None:
    """Name the engine in its events, and have its values reported to vLLM's /metrics."""
    settings, model = load(), vllm_config.model_config
    index = vllm_config.parallel_config.data_parallel_index
    EVENTS.engine, EVENTS.format = engine_name(str(model.served_model_name or model.model), index), settings.events
    EVENTS.listen(list_in_ray)
    for counter in COUNTERS:  # from the start: Prometheus takes no first value for an increase
        VALUES.add(counter, 0)
    if settings.metrics == "on":
        report_values()
    if getattr(vllm_config.parallel_config, "enable_fault_tolerance", False):  # vLLM 0.27 and later
        fault_tolerance.install()


def _count_write(seconds: float) -> None:
    """Count a write to the workers' queue: one for each step, so that it has to be cheap."""
    VALUES.observe(WRITES, WRITE_TIME, seconds)


def _step_limit_s() -> float:
    return step_limit_s(load().hang_s, float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS))
