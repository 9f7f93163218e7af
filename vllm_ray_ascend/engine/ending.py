"""Time for an engine core to end: vLLM kills it in the same instant in which it tells it to stop."""

from __future__ import annotations

from types import ModuleType

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.settings import load

_NAME = "get_engine_process_shutdown_timeout"
_ENGINES_OWN_S = 12.0
"""Seconds beside those that its workers have."""


def grant_time(utils: ModuleType) -> None:
    """Let an engine core's process end by itself, where vLLM would wait for it no time at all.

    vLLM (0.30 on) waits 15 s on ROCm for the same reason, in the function that is replaced here; without it workers
    are never told to stop, and HCCL's connections end with their processes. Older releases wait 5 s.
    """
    if not hasattr(utils, _NAME):
        return
    original = upstream(utils, _NAME)

    def timeout(request_timeout: float | None, process_timeout: float | None) -> float | None:
        seconds: float | None = original(request_timeout, process_timeout)
        return load().stop_grace_s + _ENGINES_OWN_S if request_timeout == 0 and seconds == 0 else seconds

    replace(utils, _NAME, timeout)
