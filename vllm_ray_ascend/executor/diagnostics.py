"""Texts of an executor's errors: workers that are late, that hang, that do not answer or that died. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_ray_ascend.control.health_check import Reports
from vllm_ray_ascend.control.server import PeerLost
from vllm_ray_ascend.control.timeouts import limit_variable


def late_message(phase: str, limit_s: float, ranks: list[int], reports: Reports) -> str:
    """Return which ranks are late in a phase of the startup, and what each rank does."""
    absent = [rank for rank in ranks if rank not in reports]
    no_process = f"\n  ranks {absent}: no process yet. Ray starts it once its bundle is free: see `ray status`."
    return (
        f"{phase}: ranks {ranks} are not ready after {limit_s:g} s. If they only need longer, raise "
        f"{limit_variable(phase)} (0: no limit). What each rank does:{_list_reports(reports)}"
        f"{no_process if absent else ''}"
    )


def hung_message(method: str, limit_s: float, reports: Reports) -> str:
    """Return which ranks hang in a step, and where."""
    silent = [rank for rank, report in reports.items() if report is None]
    stopped = f"Ranks {silent} do not answer: stopped, or stuck in native code. " if silent else ""
    return (
        f"{method} has not ended after {limit_s:g} s. {stopped}If it only needs longer, raise VLLM_RAY_ASCEND_HANG_S "
        "and VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, which has to be the greater. What each rank does:"
        f"{_list_reports(reports)}"
    )


def idle_message(limit_s: float, reports: Reports) -> str:
    """Return which ranks do not answer the health check though they have no work."""
    silent = [rank for rank, report in reports.items() if report is None]
    return (
        f"Ranks {silent} have no work, and have not answered for half of {limit_s:g} s: stopped, or one of their "
        "threads keeps the interpreter busy. If so, raise VLLM_RAY_ASCEND_HANG_S. What each rank does:"
        f"{_list_reports(reports)}"
    )


def worker_died_message(loss: PeerLost) -> str:
    """Return which worker process died, and where its last output is. Its pid is 0 where only Ray monitored it."""
    process = f"Worker process {loss.pid}" if loss.pid else "The worker process"
    return (
        f"{process} of rank {loss.rank} ({loss.location}) died. Its last output is {_log_of(loss)} on that node; if it "
        "ran out of memory, the kernel's "
        "message is in `dmesg`. All workers of the engine were stopped."
    )


def _log_of(loss: PeerLost) -> str:
    """Return the file of a worker's output. Without --temp-dir of `ray start` Ray's folder is /tmp/ray."""
    return loss.log or f"in logs/worker-*-{loss.pid or '*'}.err of Ray's session folder (/tmp/ray/session_latest)"


def phase_ranges(phase_seconds: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Return, for each phase that ranks timed themselves, the range of its seconds and the slowest rank."""
    phases: dict[str, dict[int, float]] = {}
    for rank, each in phase_seconds.items():
        for phase, seconds in each.items():
            phases.setdefault(phase, {})[rank] = seconds
    result = []
    for phase, by_rank in phases.items():
        slowest = max(by_rank, key=lambda rank: by_rank[rank])
        low, high = min(by_rank.values()), by_rank[slowest]
        result.append(f"{phase} {low:.2f} to {high:.2f} s (slowest: rank {slowest})")
    return result


def _list_reports(reports: Reports) -> str:
    return "".join(f"\n  rank {rank}: {report or 'does not answer'}" for rank, report in reports.items())
