"""The startup of an engine's workers: each phase is timed and limited, and the first failure ends it and is raised."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from vllm_ray_ascend.control.timeouts import MODEL, QUEUES, RENDEZVOUS, WORKERS, startup_limits
from vllm_ray_ascend.errors import VllmRayAscendError, WorkerFailedError, WorkerLateError
from vllm_ray_ascend.executor.diagnostics import late_message, phase_ranges
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.metrics import PHASES, VALUES
from vllm_ray_ascend.settings import Settings

logger = get_logger(__name__)

_Value = TypeVar("_Value")

_POLL_S = 0.2
_FAILURE_REPORT_S = 1.0
"""Seconds for which a worker's own failure report may arrive later than Ray's error."""
_GET_PHASES = (WORKERS, MODEL, QUEUES)
"""The phases in which upstream gets one result of each rank, in order; between the first two, rank 0's rendezvous."""


class StartupRayProxy:
    """Replaces the module ``ray`` in upstream's _init_executor: its `get` has limits and detects failed workers."""

    def __init__(
        self, supervisor: WorkerSupervisor, settings: Settings, before_run: Callable[[], None] = lambda: None
    ) -> None:
        """``before_run`` is called when all workers are ready, before their main threads enter vLLM's busy loop."""
        import ray

        self._ray = ray
        self._supervisor = supervisor
        self._get_phases = iter(_GET_PHASES)
        self._before_run = before_run
        self._limits = startup_limits(settings)
        self._warm_up_limit_s = settings.warm_up_limit_s
        self.current_phase = ""
        """The phase in progress."""
        self._queues_waited_since: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def remote(self, worker_class: type) -> Any:
        """Return ray.remote of the workers' class, whose actors receive the address of the control server.

        They receive it as an argument: Ray writes the variables of a runtime_env to its logs, and the token is secret.
        """
        return _BoundRemote(self._ray.remote(worker_class), {"control_address": self._supervisor.control_address()})

    def get(self, references: Any) -> Any:
        """Return ray.get of one result of rank 0, or of a list with one result of each rank in order."""
        is_single = not isinstance(references, list)
        phase = RENDEZVOUS if is_single else next(self._get_phases, QUEUES)
        with self.track_phase(phase):
            values = self._get_results([references] if is_single else references, phase)
        if phase == QUEUES:
            self._before_run()
        return values[0] if is_single else values

    def check_queues_ready(self, ranks: Sequence[int]) -> None:
        """Raise the first failure, or WorkerLateError where the queues to ``ranks`` are not connected within the limit.

        Called again and again while the executor waits for them.
        """
        self._supervisor.raise_if_failed()
        started = self._queues_waited_since = self._queues_waited_since or time.monotonic()
        self._raise_if_late(list(ranks), QUEUES, time.monotonic() - started)

    @contextlib.contextmanager
    def track_phase(self, phase: str) -> Iterator[None]:
        """Time a phase of the startup and log it."""
        started = time.monotonic()
        self.current_phase = phase
        try:
            yield
        finally:
            self.current_phase = ""
        seconds = time.monotonic() - started
        VALUES.set(PHASES, seconds, phase)
        logger.info("start: %s took %.2f s%s", phase, seconds, self._format_rank_phases(phase))

    def limit_s(self, phase: str) -> float | None:
        """Return the seconds that ``phase`` may take; None where it has no limit."""
        return self._limits.get(phase, self._warm_up_limit_s) or None

    def late_error(self, phase: str, limit_s: float, ranks: list[int]) -> WorkerLateError:
        """Return the error for ``ranks`` that are late in ``phase``, with what each rank is doing."""
        return WorkerLateError("VRA-316", late_message(phase, limit_s, ranks, self._supervisor.request_reports()))

    def run_supervised(self, call: Callable[[], _Value], phase: str) -> _Value:
        """Return the result of ``call``, which uses the workers itself; raise the first failure, or WorkerLateError."""
        result: Future[_Value] = Future()
        started = time.monotonic()
        threading.Thread(target=_run_call, args=(call, result), daemon=True, name="RayAscendStartup").start()
        while not wait([result], _POLL_S).done:
            self._supervisor.raise_if_failed()
            self._raise_if_late(list(self._supervisor.current_phases()), phase, time.monotonic() - started)
        try:
            return result.result()
        except VllmRayAscendError:
            raise
        except Exception as error:  # any error of a worker, or Ray's of its death: the first failure is its cause
            failure = self._supervisor.wait_for_failure(_FAILURE_REPORT_S)
            if failure is None:
                raise WorkerFailedError(
                    "VRA-317", f"the workers failed while the engine started ({phase}): {error}"
                ) from error
            raise failure from error

    def _get_results(self, references: list[Any], phase: str) -> list[Any]:
        """Return one result of each rank. All that is ready is taken at once, however many ranks there are."""
        pending = dict(zip(references, range(len(references)), strict=True))
        values: dict[int, Any] = {}
        started = time.monotonic()
        while pending:
            done, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            for reference in done:
                rank = pending.pop(reference)
                values[rank] = self._get_result(reference, rank, phase)
            if pending:
                self._supervisor.raise_if_failed()
                self._raise_if_late(sorted(pending.values()), phase, time.monotonic() - started)
        return [values[rank] for rank in range(len(references))]

    def _get_result(self, reference: Any, rank: int, phase: str) -> Any:
        try:
            return self._ray.get(reference)
        except Exception as error:  # any error of the worker, or Ray's of its death: the first failure is its cause
            failure = self._supervisor.wait_for_failure(_FAILURE_REPORT_S)
            if failure is None:
                raise WorkerFailedError(
                    "VRA-318", f"rank {rank} failed while the engine started ({phase}): {error}"
                ) from error
            raise failure from error

    def _raise_if_late(self, ranks: list[int], phase: str, waited_s: float) -> None:
        """Raise WorkerLateError where a rank exceeds the limit of the phase that it is in."""
        current_phases = self._supervisor.current_phases()
        for rank in ranks:
            own_phase, own_seconds = current_phases.get(rank, ("", 0.0))
            late_phase, seconds = (own_phase, own_seconds) if own_phase else (phase, waited_s)
            limit = self.limit_s(late_phase)
            if limit is not None and seconds > limit:
                raise self.late_error(late_phase, limit, ranks)

    def _format_rank_phases(self, phase: str) -> str:
        """Return the phases that ranks timed themselves within ``phase``, of the fastest and of the slowest rank."""
        if phase != MODEL:
            return ""
        phase_seconds = {peer.rank: peer.phase_seconds for peer in self._supervisor.connected_workers()}
        return "".join(f"; {text}" for text in phase_ranges(phase_seconds))


def _run_call(call: Callable[[], _Value], result: Future[_Value]) -> None:
    try:
        result.set_result(call())
    except BaseException as error:  # noqa: BLE001  the thread that waits for the result raises it
        result.set_exception(error)


class _BoundRemote:
    """The result of ray.remote, with further keyword arguments for its actors."""

    def __init__(self, actor_class: Any, arguments: Mapping[str, Any]) -> None:
        self._actor_class, self._arguments = actor_class, arguments

    def options(self, **options: Any) -> _BoundRemote:
        return _BoundRemote(self._actor_class.options(**options), self._arguments)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._actor_class.remote(*args, **kwargs, **self._arguments)
