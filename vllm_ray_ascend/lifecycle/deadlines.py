"""How long each part of a start may take, and a step. The innermost limit has to be the shortest, to be seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vllm_ray_ascend.settings import Settings

HCCL = "HCCL_EXEC_TIMEOUT"
"""Seconds that HCCL waits for a peer within one collective; 1836 where it is unset."""
EXECUTE = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
_HCCL_UNIT_S = 68
"""Atlas A2 counts HCCL_EXEC_TIMEOUT in units of 68 s and rounds up."""
_HCCL_DEFAULT_S = 1836

STEPS = ("execute_model", "sample_tokens", "execute_dummy_batch")
"""What vLLM asks of workers while it serves: when one of these fails, the engine is at its end."""

WORKERS = "worker processes"
RENDEZVOUS = "rendezvous"
DEVICE = "NPUs and their groups"
MODEL = "model"
QUEUES = "message queues"
PAIRS = "pipeline pairs"
GRAPH = "compiled graph"


class StepLimits(NamedTuple):
    """Seconds. ``hccl_s`` is None where the user has set HCCL's limit, or where ours is too short to put one below."""

    hang_s: float
    hccl_s: int | None
    note: str


def step_limits(hang_s: float, execute_s: float, environ: Mapping[str, str]) -> StepLimits:
    """Limits of one step: HCCL's < ours < vLLM's ``execute_s``, which says nothing of who hangs.

    ``hang_s`` 0 is four fifths of ``execute_s``. A user's HCCL_EXEC_TIMEOUT stays; a note says where it is too long.
    """
    limit = hang_s or 0.8 * execute_s
    given = environ.get(HCCL, "")
    if not given:
        units = max(0, int((limit - 1) // _HCCL_UNIT_S))
        return StepLimits(limit, units * _HCCL_UNIT_S or None, "")
    note = ""
    if given.isdigit() and int(given) >= limit:
        note = (
            f"{HCCL}={given} is not below the {limit:g} s after which a step counts as hung, so HCCL's own message, "
            f"which names the peer, comes too late. Set {HCCL} to {max(1, int(limit) - 1)} or less, or raise {EXECUTE} "
            f"(now {execute_s:g})."
        )
    return StepLimits(limit, None, note)


def start_limits(settings: Settings) -> dict[str, float]:
    """Seconds that each part of a start may take; 0 is no limit."""
    device = settings.device_limit_s
    return {
        WORKERS: settings.worker_limit_s,
        RENDEZVOUS: settings.worker_limit_s,
        DEVICE: device,
        MODEL: settings.load_limit_s,
        QUEUES: device,
        PAIRS: device,
        GRAPH: device,
    }


SWITCHES = {
    WORKERS: "VLLM_RAY_ASCEND_WORKER_LIMIT_S",
    RENDEZVOUS: "VLLM_RAY_ASCEND_WORKER_LIMIT_S",
    DEVICE: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    MODEL: "VLLM_RAY_ASCEND_LOAD_LIMIT_S",
    QUEUES: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    PAIRS: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    GRAPH: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
}
"""Which switch holds the limit of a part; the warm-up limit holds for all that comes later."""


def switch_of(part: str) -> str:
    """The variable that raises the limit of ``part``."""
    return SWITCHES.get(part, "VLLM_RAY_ASCEND_WARM_UP_LIMIT_S")
