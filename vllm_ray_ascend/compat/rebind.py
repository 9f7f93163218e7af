"""Run an upstream function with some of its module's globals replaced, for that call only."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from vllm_ray_ascend.errors import UpstreamChangedError


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
            "replaces there. Install a vLLM that this version supports (0.23 to 0.33), a newer vllm-ray-ascend, or set "
            "VLLM_RAY_ASCEND_EXECUTOR=upstream."
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


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
