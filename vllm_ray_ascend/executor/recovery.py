"""VLLM_RAY_ASCEND_RECOVER=1: which calls are repeated for new workers, and when workers are not restarted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_ray_ascend.engine.calls import READINESS_CALLS, STATELESS_CALLS
from vllm_ray_ascend.engine.rank_recovery import steps_together
from vllm_ray_ascend.errors import HeadLostError, SettingError
from vllm_ray_ascend.observability.events import EVENTS, WORKERS_CHANGED

_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 600.0


class Call(NamedTuple):
    """A collective_rpc and its arguments."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recovery:
    """What one executor records so that its workers can be replaced."""

    def __init__(self, restarts_workers: bool = True) -> None:
        """``restarts_workers``: whether the executor replaces them; else the engine core is restarted with them."""
        self.restarts_workers = restarts_workers
        self.calls: list[Call] = []
        self.changed_by = ""
        """The first call after which new workers would differ from the old ones."""
        self.restarts: list[float] = []
        """When workers were restarted, by time.monotonic()."""

    def record_call(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call of all workers. Our own calls, which every startup makes, do not count."""
        if getattr(method, "__module__", "").startswith("vllm_ray_ascend."):
            return
        name = method if isinstance(method, str) else getattr(method, "__qualname__", "a function")
        if name in READINESS_CALLS:
            self.calls.append(Call(name, args, kwargs))
        elif name not in STATELESS_CALLS and not self.changed_by:
            self.changed_by = name
            EVENTS.emit(WORKERS_CHANGED, call=name)

    def restart_obstacle(self, cause: Exception) -> str:
        """Return why the workers are not restarted after the failure ``cause``; empty where they may be."""
        return restart_obstacle(cause, self.changed_by, self.restarts, time.monotonic())


def restart_obstacle(cause: Exception, changed_by: str, restarts: Sequence[float], now: float) -> str:
    """Return why workers are not restarted, or an empty string. Times are in seconds."""
    if isinstance(cause, HeadLostError):
        return "Ray's head is gone, and without it no worker can be started."
    if changed_by:
        return (
            f"collective_rpc({changed_by!r}) may have changed the workers (weights, sleep), and new ones would lack "
            "that. Start the engine again, and repeat the call."
        )
    recent = [each for each in restarts if now - each < _RESTART_WINDOW_S]
    if len(recent) >= _MAX_RESTARTS:
        return (
            f"they were restarted {len(recent)} times within {_RESTART_WINDOW_S:g} s, so the cause persists: see the "
            "first error of each startup above."
        )
    return ""


def check_recoverable(config: Any) -> None:
    """Raise SettingError where an engine of this vLLM config cannot continue with new workers."""
    if steps_together(config) and config.parallel_config.data_parallel_backend != "ray":
        reason = (
            "data parallel ranks of a MoE model step together, and are restarted together only with "
            "--data-parallel-backend ray"
        )
    elif config.kv_transfer_config is not None:
        reason = "a KV connector's peers know the old workers (--kv-transfer-config)"
    elif getattr(config, "ec_transfer_config", None) is not None:
        reason = "an encoder cache connector's peers know the old workers (--ec-transfer-config)"
    else:
        return
    raise SettingError(
        "VRA-315", f"VLLM_RAY_ASCEND_RECOVER=1 is not supported here: {reason}. Unset it, or leave that option out."
    )
