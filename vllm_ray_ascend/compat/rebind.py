"""Upstream names, replaced: for one call of a function, or in their module for good."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from vllm_ray_ascend.errors import UpstreamChangedError

_REMEDY = (
    "Install a vLLM that this version supports (0.23 to 0.33), a newer vllm-ray-ascend, or set "
    "VLLM_RAY_ASCEND_EXECUTOR=upstream."
)


def with_globals(function: FunctionType, **replacements: Any) -> FunctionType:
    """``function`` with global names replaced; the module, other functions and other threads see nothing of it.

    For upstream functions that are one piece without hooks, such as RayExecutorV2._init_executor: what they look up in
    their module is the same in vLLM 0.23 to 0.33. Raises UpstreamChangedError when the function no longer uses a name
    that is replaced, since the replacement would then be lost without notice.
    """
    used = set(_global_names(function.__code__))
    lost = sorted(name for name in replacements if name not in used or name not in function.__globals__)
    if lost:
        raise UpstreamChangedError(
            f"{function.__module__}.{function.__qualname__} no longer uses {', '.join(lost)}, which vllm-ray-ascend "
            f"replaces there. {_REMEDY}"
        )
    rebound = FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    rebound.__qualname__ = function.__qualname__
    return rebound


def replace(module: ModuleType | type, name: str, replacement: Any) -> None:
    """Let ``module.name`` mean ``replacement``; `upstream` still finds what it was. May be called again.

    Raises UpstreamChangedError where the module has no such name.
    """
    if not hasattr(module, name):
        raise UpstreamChangedError(f"{module.__name__} no longer has {name}, which vllm-ray-ascend replaces. {_REMEDY}")
    if not hasattr(module, _kept(name)):
        setattr(module, _kept(name), getattr(module, name))
    setattr(module, name, replacement)


def upstream(module: ModuleType | type, name: str) -> Any:
    """What ``module.name`` is without us."""
    return getattr(module, _kept(name), None) or getattr(module, name)


def _kept(name: str) -> str:
    return f"_vllm_ray_ascend_upstream_{name}"


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
