"""The executor behind `--distributed-executor-backend ray`. Imported late: it needs vLLM and Ray."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm import envs
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import (
    WORKER_SPECIFIC_ENV_VARS,
    build_actor_name,
    get_bundles_sorted_by_node,
    initialize_ray_cluster,
)

from vllm_ray_ascend import __version__
from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.cluster.groups import release
from vllm_ray_ascend.cluster.registry import EngineRecord, publish, unheeded_list, withdraw
from vllm_ray_ascend.compat.rebind import with_globals
from vllm_ray_ascend.compat.versions import stack
from vllm_ray_ascend.engine.ending import end_with_server
from vllm_ray_ascend.engine.process import driver_variable, end_without_collecting, variables_that_stay
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, early_variables
from vllm_ray_ascend.errors import VllmRayAscendError, WorkerLateError
from vllm_ray_ascend.executor.answers import AnsweringExecutor
from vllm_ray_ascend.executor.life import Life
from vllm_ray_ascend.executor.placing import place
from vllm_ray_ascend.executor.queues import CancellableQueue, queues_of
from vllm_ray_ascend.executor.ranks import Rank, ready_line, report
from vllm_ray_ascend.executor.record import check_owners, record_of
from vllm_ray_ascend.executor.recovery import Recovery, refuse_unrecoverable
from vllm_ray_ascend.executor.start import Start, hung_text, late_text
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
from vllm_ray_ascend.lifecycle.deadlines import PAIRS, STEPS, step_limits
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_REPORT_LIMIT_S = 60.0
_NICENESS = "RAY_worker_niceness"
_START_PHASES = {
    "get_kv_cache_specs": "KV cache layout",
    "determine_available_memory": "profile run",
    "initialize_from_config": "KV cache",
    "compile_or_warm_up_model": "graphs and warm-up",
}
"""What vLLM asks of an executor after it was made and before the engine serves; the last since vLLM 0.28."""


class RayAscendExecutor(AnsweringExecutor):
    """vLLM's RayExecutorV2 on NPUs. Its start is upstream's, with our worker, our checks and our rule for variables."""

    _worker_class: type[RayAscendWorkerProc] = RayAscendWorkerProc
    ranks: list[Rank]
    ray_worker_handles: list[Any]

    def _init_executor(self) -> None:
        end_without_collecting()
        end_with_server()
        self._own_group: Any = None
        self._record: EngineRecord | None = None
        self._recovery = _recovery(self.vllm_config)
        self._start_all()

    def _start_all(self) -> None:
        self._hang_s = _hang_s()
        self._life = Life(self, self._hang_s)
        self._start = self._new_start()
        try:
            self._start_workers()
        except BaseException as error:
            self.shutdown()
            if self._life.cause not in (None, error):
                raise self._life.cause from error
            raise
        logger.info("%s", ready_line(__version__, stack(), self.ranks))

    def _new_start(self) -> Start:
        return Start(self._life)

    def _start_workers(self) -> None:
        start = with_globals(
            super()._init_executor.__func__,
            ray=self._start,
            RayWorkerProc=self._worker_class,
            WORKER_SPECIFIC_ENV_VARS=WORKER_SPECIFIC_ENV_VARS | variables_that_stay(),
            initialize_ray_cluster=self._initialize_ray_cluster,
            MessageQueue=CancellableQueue,
            build_actor_name=self._actor_name,
            get_bundles_sorted_by_node=self._bundles,
        )
        start(self)
        self.ranks = self.collective_rpc(report, timeout=_REPORT_LIMIT_S)
        self._enter_registry()
        if self.parallel_config.pipeline_parallel_size > 1:
            with self._start.phase(PAIRS):
                self.collective_rpc("connect_pairs")

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As upstream's. Parts of the start and steps have a limit, after which the log says what each rank does."""
        self._life.check()
        if self._recovery is not None:
            self._recovery.note(method, args, kwargs)
        return self._life.pulse.during(lambda: self._limited(method, timeout, *args, **kwargs))

    def _limited(self, method: str | Callable[..., Any], timeout: float | None, *args: Any, **kwargs: Any) -> Any:
        part = self._start.part
        if part:
            limit = self._start.limit_s(part)
        elif method in STEPS:
            limit = self._hang_s
        else:
            return super().collective_rpc(method, timeout, *args, **kwargs)
        if timeout is not None:
            limit = timeout if limit is None else min(timeout, limit)
        late = functools.partial(self._late, str(method), part, limit or 0.0)
        try:
            answer = super().collective_rpc(method, limit, *args, **kwargs)
        except TimeoutError as error:
            raise late() from error
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: late() if isinstance(done.exception(), TimeoutError) else None)
        return answer

    def _late(self, method: str, part: str, limit_s: float) -> WorkerLateError:
        """End the engine, whose workers hang."""
        reports = self._life.reports()
        error = WorkerLateError(
            late_text(part, limit_s, sorted(reports), reports) if part else hung_text(method, limit_s, reports)
        )
        self._life.fail(error)
        return error

    def _build_runtime_env(self) -> dict[str, Any]:
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        variables = runtime_env.setdefault("env_vars", {})
        for name, value in early_variables().items():
            variables.setdefault(name, value)
        variables.setdefault(DRIVER_VARIABLE, driver_variable())
        # Ray runs workers at niceness 15: on busy cores the spinning driver, and everybody else, would go before them.
        variables.setdefault(_NICENESS, os.environ.get(_NICENESS, "0"))
        return runtime_env

    def wake(self, cause: BaseException) -> None:
        """End every wait for an answer of the workers with ``cause``. Called in the thread that has found it."""
        for queue in queues_of(self):
            queue.cancel(cause)

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Watch the workers by their connections, and by Ray where one has none. Upstream polls Ray alone."""
        self._life.watch(inline)

    @property
    def cause(self) -> VllmRayAscendError | None:
        """What ended the engine; None while all is well."""
        return self._life.cause

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """As upstream's; kept for workers that come after a restart."""
        self._on_failure = callback
        super().register_failure_callback(callback)

    def may_restart(self, limit_s: float = 0.0) -> bool:
        """Whether the workers have failed, waited for ``limit_s`` seconds, and `restart` may have them anew."""
        if self._recovery is None or self._life.wait_for_loss(limit_s) is None:
            return False
        if why := self._recovery.obstacle():
            logger.error("The workers are not restarted: %s", why)
        return not why

    def restart(self) -> None:
        """After a failure: all workers anew, in the same bundles, made ready as the old ones were. Raises what ends
        their start."""
        recovery = self._recovery
        assert recovery is not None
        started = time.monotonic()
        group, self._own_group = self._own_group, None
        self.shutdown()
        self._finalizer.detach()
        recovery.restarts.append(started)
        self._own_group = group
        logger.warning("Restarting all workers (restart %d of this engine)", len(recovery.restarts))
        self._start_all()
        super().register_failure_callback(self._on_failure)
        calls, recovery.calls = recovery.calls, []
        for call in calls:
            with self._start.phase(call.method):
                self.collective_rpc(call.method, None, *call.args, **call.kwargs)
        logger.warning("All workers were restarted in %.1f s", time.monotonic() - started)

    def shutdown(self) -> None:
        """End the workers in order, kill what is left as upstream does, leave the registry, give our group's NPUs back.

        Where Ray is shut down already, as when the interpreter ends, its actors are gone: asking for them would make
        Ray join the cluster anew.
        """
        import ray

        if getattr(self, "_life", None) is not None and self._life.end_workers():
            self.shutting_down = False  # a failure has set it, and upstream's part is still to come
        if not ray.is_initialized():
            self.ray_worker_handles = []
        queues = queues_of(self)
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
            withdraw(record)
        if group is not None:
            release([group])
            self.parallel_config.placement_group = None

    def _initialize_ray_cluster(self, parallel_config: Any, ray_address: str | None = None, **options: Any) -> None:
        """vLLM's, after our checks and with our placement group, so that vLLM neither waits for one nor keeps it."""
        if self._own_group is None:
            self._own_group = place(self.vllm_config, ray_address)
        initialize_ray_cluster(parallel_config, ray_address, **options)

    def _bundles(self, placement_group: Any) -> list[Any]:
        """vLLM's order of bundles, as many as there are ranks: its message queue waits for a reader in each bundle."""
        bundles: list[Any] = get_bundles_sorted_by_node(placement_group)
        return bundles[: self.world_size]

    def _actor_name(self, instance_id: str, *sizes: int) -> str:
        """vLLM's name of a worker, unique among data parallel engines in one Ray namespace whoever started them."""
        dp_rank = self.parallel_config.data_parallel_index
        suffix = f"_dp{dp_rank}"
        if dp_rank and not instance_id.endswith(suffix):
            instance_id += suffix
        if self._recovery is not None and self._recovery.restarts:
            instance_id += f"_restart{len(self._recovery.restarts)}"
        name: str = build_actor_name(instance_id, *sizes)
        return name

    def _enter_registry(self) -> None:
        record = record_of(self)
        check_owners(record)
        self._record = record
        publish(record)
        kind = current().kind
        if note := unheeded_list(os.environ.get(kind.variable), record.address, [record], kind):
            logger.warning("%s", note)


def _recovery(vllm_config: Any) -> Recovery | None:
    """Where the user wants workers restarted: what that takes, and an engine core that waits for it."""
    if load().recover == "0":
        return None
    refuse_unrecoverable(vllm_config)
    from vllm_ray_ascend.engine.going_on import let_engines_go_on

    let_engines_go_on()
    return Recovery()


def _hang_s() -> float:
    """Seconds after which a step counts as hung; warns of limits in the wrong order."""
    limits = step_limits(load().hang_s, float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), os.environ)
    if limits.note:
        logger.warning("%s", limits.note)
    return limits.hang_s


def _as_phase(name: str, phase: Callable[..., Any]) -> Callable[..., Any]:
    """``phase`` of a start, timed; where it fails nobody else stops the workers, and a driver that goes on would keep
    them."""

    @functools.wraps(phase)
    def guarded(self: RayAscendExecutor, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._start.phase(name):
                return phase(self, *args, **kwargs)
        except BaseException as error:
            self.shutdown()
            if self._life.cause not in (None, error):
                raise self._life.cause from error
            raise

    return guarded


for _name, _called in _START_PHASES.items():
    if hasattr(RayExecutorV2, _name):
        setattr(RayAscendExecutor, _name, _as_phase(_called, getattr(RayExecutorV2, _name)))
