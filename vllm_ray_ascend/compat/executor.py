"""Which class `--distributed-executor-backend ray` means."""

from __future__ import annotations

from types import ModuleType
from typing import Any

_UPSTREAM = "_vllm_ray_ascend_upstream"


def select(executor: type) -> None:
    """Let the name RayExecutorV2 mean ``executor``; upstream's stays under another name. May be called again.

    Symptom: users say "ray", and vLLM's config and vllm-ascend's NPUWorker compare that very string, so a class or a
    qualified name in its place misses their code for Ray. Mechanism: Executor.get_class looks the name up in its module
    at each call, in vLLM 0.23 to 0.33. Removable when vLLM has a registry of executors.
    """
    module = _module()
    if getattr(module, _UPSTREAM, None) is None:
        setattr(module, _UPSTREAM, module.RayExecutorV2)
    module.RayExecutorV2 = executor  # type: ignore[attr-defined]


def _module() -> ModuleType:
    from vllm.v1.executor import ray_executor_v2

    module: Any = ray_executor_v2
    assert isinstance(module, ModuleType)
    return module
