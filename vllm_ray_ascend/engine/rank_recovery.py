"""Restart of data parallel ranks that are lost, while the others serve (VLLM_RAY_ASCEND_RECOVER=1).

vLLM ends all ranks with the first. Ranks of a dense model never communicate, so each is a failure domain of its own;
those of a mixture of experts step together, so all of them are one.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vllm_ray_ascend.control.protocol import Extension
from vllm_ray_ascend.engine.rank_status import RANK_DOWN, RANK_UP, RankStatus, StatusPublisher
from vllm_ray_ascend.errors import ClusterResourceError, PlacementError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS, RANKS_LOST, RANKS_RESTORED
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_WINDOW_S = 600.0
_MAX_DELAY_S = 60.0
_DRAIN = "drain:"
_DRAIN_S = 120
_EXIT_S = 10.0
_MAX_ATTEMPTS_ALONE = 3
"""How often each start may fail while no rank serves."""

Restart = Callable[[Sequence[int]], Sequence[int]]


def restart_delay_s(starts: Sequence[float], now: float) -> float:
    """Return the seconds until a rank is started again that was at these times: exponential, for a rank that flaps."""
    recent = sum(now - each < _WINDOW_S for each in starts)
    return min(2.0 ** (recent - 1), _MAX_DELAY_S) if recent > 1 else 0.0


def steps_together(vllm_config: Any) -> bool:
    """Return whether an engine core of this vLLM config steps together with others, and cannot continue alone."""
    return bool(vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe)


def failure_domains(vllm_config: Any) -> list[list[int]]:
    """Return which data parallel ranks of a vLLM config end with one another, and are restarted together."""
    ranks = list(range(vllm_config.parallel_config.data_parallel_size))
    return [ranks] if steps_together(vllm_config) else [[rank] for rank in ranks]


def may_restart_ranks(vllm_config: Any) -> bool:
    """Return whether lost ranks of an engine are restarted: it has several, of which its API servers know all.

    vLLM's front end in Rust runs no code of ours.
    """
    config = vllm_config.parallel_config
    return (
        load().recover == "1"
        and config.data_parallel_size > 1
        and not config.local_engines_only
        and os.environ.get("VLLM_USE_RUST_FRONTEND", "0") in ("", "0")
    )


def drain_limit_s(deadline_ms: int, now_s: float) -> int:
    """Return the seconds within which a rank finishes, on a node that is stopped at ``deadline_ms`` since 1970 (0: not
    known): what is left but a few seconds for its exit.
    """
    return max(1, int(deadline_ms / 1000 - now_s - _EXIT_S)) if deadline_ms else _DRAIN_S


def drain_message(seconds: int) -> Extension:
    """Return the message that lets an engine core finish its requests within ``seconds``, and exit."""
    return Extension(f"{_DRAIN}{seconds}")


def drain_seconds(name: str) -> int:
    """Return the seconds in the name of a `drain_message`; 0 for another message."""
    return int(name.removeprefix(_DRAIN)) if name.startswith(_DRAIN) else 0


class RankRecovery:
    """Restarts lost ranks, one failure domain at a time in each thread."""

    def __init__(self, domains: Sequence[Sequence[int]], restart: Restart, publisher: StatusPublisher) -> None:
        """``domains``: see `set_domains`. ``restart`` starts ranks and returns those that serve then.

        It raises any error where it fails.
        """
        self._restart = restart
        self._publisher = publisher
        self._lock = threading.Lock()
        self.set_domains(domains)
        self._down: set[int] = set()
        self._starts: defaultdict[int, list[float]] = defaultdict(list)
        self._failed_alone: Counter[tuple[int, ...]] = Counter()
        """How often each failure domain could not be started since any rank served."""
        self._stopped = threading.Event()
        self.changed_by = ""
        """The call after which a new engine core would lack something that the others have."""
        self.ended = threading.Event()
        """Set once all ranks have to end."""
        self.cause = ""
        """Why it ended."""

    def set_domains(self, domains: Sequence[Sequence[int]]) -> None:
        """Restart the ranks of each of the ``domains`` together from now on, and no other ranks."""
        with self._lock:
            self._domain = {rank: tuple(domain) for domain in domains for rank in domain}

    def domain(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that are restarted with ``rank``, and itself; none where it is about to join or to leave."""
        with self._lock:
            return self._domain.get(rank, ())

    def down(self) -> set[int]:
        """Return the ranks that do not serve."""
        with self._lock:
            return set(self._down)

    def lose(self, rank: int, cause: str) -> None:
        """Restart a rank that is lost, and those that step with it. Does not wait.

        Known losses are ignored, and those of ranks of no domain: they are about to join or to leave.
        """
        with self._lock:
            ranks = self._domain.get(rank, ())
            if not ranks or self._stopped.is_set() or rank in self._down:
                return
            self._down.update(ranks)
        if self.changed_by:
            logger.error(
                "VRA-153: data parallel ranks %s are not restarted, and all end: %r may have changed the workers "
                "(weights, sleep), and new ones would lack that. Start the engine again and repeat the call. Cause: %s",
                _format(ranks),
                self.changed_by,
                cause,
            )
            self._end(cause)
            return
        threading.Thread(target=self._recover, args=(ranks, cause), daemon=True, name="RayAscendRankRecovery").start()

    def drain(self, rank: int, cause: str) -> tuple[int, ...]:
        """Let API servers send nothing more to a rank, and to those that step with it; return these ranks.

        They are about to finish their requests, and to end.
        """
        domain = self.domain(rank)
        for each in domain:
            self._publisher.publish(RANK_DOWN, RankStatus(each, cause))
        return domain

    def stop(self) -> None:
        """Restart nothing from now on."""
        with self._lock:
            self._stopped.set()

    def _recover(self, ranks: tuple[int, ...], cause: str) -> None:
        lost_at = time.monotonic()
        for rank in ranks:
            self._publisher.publish(RANK_DOWN, RankStatus(rank, cause, requests_lost=True))
            self._publisher.reset_coordinator(rank)
        EVENTS.emit(RANKS_LOST, ranks=_format(ranks), cause=cause)
        started = self._start_until_it_succeeds(ranks, cause)
        if not started:
            return
        if len(started) < len(ranks):  # they are all that there are
            self.set_domains([started])
        with self._lock:
            self._down.difference_update(ranks)
            self._failed_alone.clear()
        for rank in started:
            self._publisher.publish(RANK_UP, RankStatus(rank, is_new=True))
        EVENTS.emit(RANKS_RESTORED, ranks=_format(started), seconds=round(time.monotonic() - lost_at, 3))

    def _start_until_it_succeeds(self, ranks: tuple[int, ...], cause: str) -> Sequence[int]:
        """Start ranks, with growing delays between attempts. Return those that serve; none where that is given up.

        NPUs of a node that starts again, or is replaced, are waited for as workers are.
        """
        wait_until = time.monotonic() + (load().worker_limit_s or math.inf)
        attempts = 0
        while not self._stopped.wait(self._next_delay_s(ranks)):
            attempts += 1
            try:
                return self._restart(ranks)
            except Exception as error:  # whatever it is: the others serve
                if self._stopped.is_set():
                    return ()
                has_to_wait = isinstance(error, PlacementError | ClusterResourceError) and time.monotonic() < wait_until
                logger.exception(
                    "VRA-145: data parallel ranks %s could not be restarted (attempt %d), and are tried again: %s",
                    _format(ranks),
                    attempts,
                    error,
                )
            if not has_to_wait and self._nothing_can_be_started(ranks):
                self._end_without_ranks(cause)
                return ()
        return ()

    def _nothing_can_be_started(self, ranks: tuple[int, ...]) -> bool:
        """Note that a start of ``ranks`` has failed. Return whether all have often enough, while no rank served."""
        with self._lock:
            if self._down != set(self._domain):
                self._failed_alone.clear()
                return False
            self._failed_alone[ranks] += 1
            return all(self._failed_alone[each] >= _MAX_ATTEMPTS_ALONE for each in self._domain.values())

    def _next_delay_s(self, ranks: tuple[int, ...]) -> float:
        starts = self._starts[ranks[0]]
        starts.append(time.monotonic())
        return restart_delay_s(starts, starts[-1])

    def _end_without_ranks(self, cause: str) -> None:
        logger.error("VRA-149: no data parallel rank serves and none can be started, so all end: %s", cause)
        self._end(cause)

    def _end(self, cause: str) -> None:
        self.cause = cause
        self.stop()
        self.ended.set()


def _format(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
