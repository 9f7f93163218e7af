"""Puts this room's functions around vllm-ascend's, once its worker's module is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.errors import UpstreamChangedError
from vllm_ray_ascend.graphs.capture import with_steps_down, with_vote
from vllm_ray_ascend.graphs.sleep import recapturing, releasing
from vllm_ray_ascend.graphs.update import with_rescue, with_rescue_of_parameters

_WORKER = "vllm_ascend.worker.worker"
_UPDATABLE = "vllm_ascend.compilation.updatable_graph"
_MARK = "_vllm_ray_ascend"

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def install() -> None:
    """Have the hooks in this process, now or when vllm-ascend's worker is loaded. May be called again."""
    when_imported(_WORKER, _install)


def _install(module: ModuleType) -> None:
    runner = module.NPUModelRunner
    _around(runner, "capture_model", with_steps_down)
    _around(runner, "_warmup_and_capture", with_vote)
    _around(runner, "_update_full_graph_params_if_needed", with_rescue_of_parameters)
    _around(module.NPUWorker, "sleep", releasing)
    _around(module.NPUWorker, "wake_up", recapturing)
    updatable = sys.modules.get(_UPDATABLE)
    if updatable is not None:  # vllm-ascend 0.23 has none
        _around(updatable.UpdatableGraph, "update", with_rescue)


def _around(owner: type, name: str, wrap: Wrap) -> None:
    """Replace ``owner.name`` by ``wrap`` of it, once. Raises UpstreamChangedError where there is none."""
    present = getattr(owner, name, None)
    if present is None:
        raise UpstreamChangedError(
            f"{owner.__module__}.{owner.__qualname__} no longer has {name}, around which vllm-ray-ascend puts its care "
            "for ACL graphs. Install vllm-ascend 0.23 to 0.33 or a newer vllm-ray-ascend, or set "
            "VLLM_RAY_ASCEND_EXECUTOR=upstream."
        )
    if hasattr(present, _MARK):
        return
    wrapped = wrap(present)
    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
