"""The start of an engine's workers: every part timed and limited, ended by the first failure, which is the one told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_ray_ascend.errors import VllmRayAscendError, WorkerFailedError, WorkerLateError
from vllm_ray_ascend.lifecycle.deadlines import MODEL, QUEUES, RENDEZVOUS, WORKERS, start_limits, switch_of
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

if TYPE_CHECKING:
    from vllm_ray_ascend.executor.life import Life

logger = get_logger(__name__)

_Value = TypeVar("_Value")

_POLL_S = 0.2
_FIRST_WORD_S = 1.0
_ROUNDS = (WORKERS, MODEL, QUEUES)
"""What upstream waits for, one answer of each rank a time; between the first two, rank 0's rendezvous alone."""


class Start:
    """Stands in for the module ``ray`` in upstream's _init_executor: its `get` knows limits, and whom it waits for."""

    def __init__(self, life: Life, before_run: Callable[[], None] | None = None) -> None:
        """``before_run`` is called when all workers are ready, before their main threads are given to vLLM's calls."""
        import ray

        self._ray = ray
        self._life = life
        self._rounds = iter(_ROUNDS)
        self._before_run = before_run
        settings = load()
        self._limits = start_limits(settings)
        self._warm_up_limit_s = settings.warm_up_limit_s
        self.phases: dict[str, float] = {}
        """Seconds that each part took."""
        self.part = ""
        """The part that is under way."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def remote(self, worker: type) -> Any:
        """ray.remote of the workers' class. Its actors are told where the executor is as an argument: Ray writes the
        variables of a runtime_env to its logs, and the lifeline's token is nobody else's."""
        return _Told(self._ray.remote(worker), {"lifeline": self._life.hub_text()})

    def get(self, references: Any) -> Any:
        """ray.get, of one answer of rank 0 or of one of each rank in order."""
        one = not isinstance(references, list)
        part = RENDEZVOUS if one else next(self._rounds, QUEUES)
        with self.phase(part):
            values = self._wait([references] if one else references, part)
        if part == QUEUES and self._before_run is not None:
            self._before_run()
        return values[0] if one else values

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the start and name it in the log."""
        started = time.monotonic()
        self.part = name
        try:
            yield
        finally:
            self.part = ""
        self.phases[name] = time.monotonic() - started
        logger.info("start: %s took %.2f s%s", name, self.phases[name], self._by_rank(name))

    def limit_s(self, part: str) -> float | None:
        """Seconds that ``part`` may take."""
        return self._limits.get(part, self._warm_up_limit_s) or None

    def watched(self, call: Callable[[], _Value], part: str) -> _Value:
        """What ``call`` returns, which asks the workers for ``part`` by itself: ended by the first failure, or late."""
        found: Future[_Value] = Future()
        started = time.monotonic()
        threading.Thread(target=_call, args=(call, found), daemon=True, name="RayAscendStart").start()
        while not wait([found], _POLL_S).done:
            self._life.check()
            self._check_late(list(self._life.doing()), part, time.monotonic() - started)
        try:
            return found.result()
        except VllmRayAscendError:
            raise
        except Exception as error:
            first = self._life.wait_for_loss(_FIRST_WORD_S)
            if first is None:
                raise WorkerFailedError(f"the workers failed while the engine started ({part}): {error}") from error
            raise first from error

    def _wait(self, references: list[Any], part: str) -> list[Any]:
        pending = dict(zip(references, range(len(references)), strict=True))
        values: dict[int, Any] = {}
        started = time.monotonic()
        while pending:
            done, _ = self._ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
            for reference in done:
                rank = pending.pop(reference)
                values[rank] = self._value(reference, rank, part)
            if pending:
                self._life.check()
                self._check_late(sorted(pending.values()), part, time.monotonic() - started)
        return [values[rank] for rank in range(len(references))]

    def _value(self, reference: Any, rank: int, part: str) -> Any:
        try:
            return self._ray.get(reference)
        except Exception as error:
            first = self._life.wait_for_loss(_FIRST_WORD_S)
            if first is None:
                raise WorkerFailedError(f"rank {rank} failed while the engine started ({part}): {error}") from error
            raise first from error

    def _check_late(self, ranks: list[int], part: str, waited_s: float) -> None:
        """Raise WorkerLateError where a rank is over the limit of what it does."""
        doing = self._life.doing()
        for rank in ranks:
            what, seconds = doing.get(rank, ("", 0.0))
            over, spent = (what, seconds) if what else (part, waited_s)
            limit = self.limit_s(over)
            if limit is not None and spent > limit:
                raise WorkerLateError(late_text(over, limit, ranks, self._life.reports()))

    def _by_rank(self, part: str) -> str:
        """Where ranks differ: the parts of this part, of the fastest and of the slowest rank."""
        if part != MODEL:
            return ""
        spent = {peer.rank: peer.spent for peer in self._life.peers()}
        return "".join(f"; {text}" for text in spreads(spent))


def _call(call: Callable[[], _Value], found: Future[_Value]) -> None:
    try:
        found.set_result(call())
    except BaseException as error:  # noqa: BLE001  whoever waits gets it
        found.set_exception(error)


class _Told:
    """What ray.remote gives, whose actors get ``more`` arguments."""

    def __init__(self, actors: Any, more: Mapping[str, Any]) -> None:
        self._actors, self._more = actors, more

    def options(self, **options: Any) -> _Told:
        return _Told(self._actors.options(**options), self._more)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._actors.remote(*args, **kwargs, **self._more)


def spreads(spent: Mapping[int, Mapping[str, float]]) -> list[str]:
    """For each part that ranks timed themselves: its seconds, or the range of them and the slowest rank."""
    parts: dict[str, dict[int, float]] = {}
    for rank, each in spent.items():
        for part, seconds in each.items():
            parts.setdefault(part, {})[rank] = seconds
    result = []
    for part, by_rank in parts.items():
        slowest = max(by_rank, key=lambda rank: by_rank[rank])
        low, high = min(by_rank.values()), by_rank[slowest]
        result.append(f"{part} {low:.2f} to {high:.2f} s (slowest: rank {slowest})")
    return result


def late_text(part: str, limit_s: float, ranks: list[int], reports: Mapping[int, str | None]) -> str:
    """Who is late with what, and what everybody does."""
    absent = [rank for rank in ranks if rank not in reports]
    nobody = f"\n  ranks {absent}: no process yet. Ray starts it once its bundle is free: see `ray status`."
    return (
        f"{part}: ranks {ranks} are not ready after {limit_s:g} s. If they only need longer, raise {switch_of(part)} "
        f"(0: no limit). What each rank does:{_listed(reports)}{nobody if absent else ''}"
    )


def hung_text(method: str, limit_s: float, reports: Mapping[int, str | None]) -> str:
    """Which ranks hang in a step, and where."""
    silent = [rank for rank, report in reports.items() if report is None]
    who = f"Ranks {silent} do not answer: stopped, or stuck in native code. " if silent else ""
    return (
        f"{method} has not ended after {limit_s:g} s. {who}If it only needs longer, raise VLLM_RAY_ASCEND_HANG_S and "
        f"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, which has to be the greater. What each rank does:{_listed(reports)}"
    )


def idle_text(limit_s: float, reports: Mapping[int, str | None]) -> str:
    """Which ranks do not answer though nothing was asked of them but that."""
    silent = [rank for rank, report in reports.items() if report is None]
    return (
        f"Ranks {silent} have no work, and have not answered for half of {limit_s:g} s: stopped, or a thread of theirs "
        f"keeps the interpreter busy. If so, raise VLLM_RAY_ASCEND_HANG_S. What each rank does:{_listed(reports)}"
    )


def _listed(reports: Mapping[int, str | None]) -> str:
    return "".join(f"\n  rank {rank}: {report or 'does not answer'}" for rank, report in reports.items())
