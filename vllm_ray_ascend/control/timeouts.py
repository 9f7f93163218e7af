"""How long each phase of an engine's startup may take, and a step. The innermost limit is the shortest: it is seen."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ray_ascend.settings import WEEK_S, Settings

MERGED_STEP = "execute_model_and_sample_tokens"
"""A method of our workers, which calls the two of a step (executor/worker_calls.py)."""
STEPS = ("execute_model", "sample_tokens", MERGED_STEP, "execute_dummy_batch", "take_draft_token_ids")
"""What is called on workers while vLLM serves: a failure of one of these ends the engine."""

WORKERS = "worker processes"
RENDEZVOUS = "rendezvous"
DEVICE = "NPUs and their groups"
MODEL = "model"
QUEUES = "message queues"
PAIRS = "pipeline pairs"
GRAPH = "compiled graph"


def step_limit_s(hang_s: float, execute_s: float) -> float:
    """Return the seconds after which a step counts as hung; ``hang_s`` 0 means four fifths of vLLM's ``execute_s``.

    It is the only limit of a step that is shorter than vLLM's, whose error does not name who hangs. HCCL's own
    (HCCL_EXEC_TIMEOUT) is not lowered to it: it holds for a whole process, and so for collectives of the startup, of
    netloader and of weight transfers, in which a rank may legitimately be late by many minutes.
    It has the upper bound of ours too: vLLM takes any number, and a thread that waits for three centuries raises.
    """
    return hang_s or min(0.8 * execute_s, WEEK_S)


def is_commit(method: object, arguments: Sequence[object]) -> bool:
    """Return whether a call of workers commits another number of ranks: a failure of it ends the engine.

    It captures graphs again, so that the limit of the warm-up holds for it.
    """
    return method == "elastic_ep_execute" and str(arguments[0]).startswith("commit")


RANKS_PER_GRACE_SECOND = 128


def stop_grace_s(least_s: float, ranks: int) -> float:
    """Return the seconds that an orderly shutdown of ``ranks`` workers may take: ``least_s``, and more for many.

    ``least_s`` 0 stays 0: they are killed immediately. The owner sees each exit, and each rank's groups end with all
    others'.
    """
    return least_s and least_s + ranks // RANKS_PER_GRACE_SECOND


ENGINE_EXIT_EXTRA_S = 12.0
"""Seconds that an engine core in a process of its own may take in addition to the grace period of its workers."""


def engine_exit_s(least_s: float, ranks: int) -> float:
    """Return the seconds that a process with an engine core of ``ranks`` workers may take to shut down and exit.

    More than `stop_grace_s` for every number of ranks: whoever kills it later leaves no worker behind.
    """
    return stop_grace_s(least_s, ranks) + ENGINE_EXIT_EXTRA_S


def startup_limits(settings: Settings) -> dict[str, float]:
    """Return the seconds that each phase of the startup may take; 0 is no limit."""
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


LIMIT_VARIABLES = {
    WORKERS: "VLLM_RAY_ASCEND_WORKER_LIMIT_S",
    RENDEZVOUS: "VLLM_RAY_ASCEND_WORKER_LIMIT_S",
    DEVICE: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    MODEL: "VLLM_RAY_ASCEND_LOAD_LIMIT_S",
    QUEUES: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    PAIRS: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
    GRAPH: "VLLM_RAY_ASCEND_DEVICE_LIMIT_S",
}
"""The switch that holds the limit of a phase; the warm-up limit holds for all later phases."""


def limit_variable(phase: str) -> str:
    """Return the variable that raises the limit of ``phase``."""
    return LIMIT_VARIABLES.get(phase, "VLLM_RAY_ASCEND_WARM_UP_LIMIT_S")
