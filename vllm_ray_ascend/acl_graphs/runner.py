"""Plan and dispatch of graphs in vllm-ascend's default model runner ("V1")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_ray_ascend.acl_graphs.fallback import EAGER, CaptureFailure, CapturePlan


@dataclass
class CaptureState:
    """Progress and result of the captures of one model runner."""

    capturing: bool = False
    captured: int = 0
    planned: int = 0
    failure: CaptureFailure | None = None
    failure_text: str = ""
    released: bool = False
    streams_used: dict[str, int] = field(default_factory=dict)
    """How many streams the last graph of each mode took."""

    def begin_capture(self, planned: int) -> None:
        """Reset the progress for a capture of ``planned`` graphs."""
        self.capturing, self.captured, self.planned, self.failure = True, 0, planned, None
        self.streams_used.clear()


def get_capture_state(runner: Any) -> CaptureState:
    """Return the state of ``runner``, which is an attribute of it."""
    state: CaptureState | None = getattr(runner, "_vllm_ray_ascend_graphs", None)
    if state is None:
        runner._vllm_ray_ascend_graphs = state = CaptureState()
    return state


def is_supported_runner(runner: Any) -> bool:
    """Return whether ``runner`` is vllm-ascend's default one; its second one keeps graphs in another place."""
    return hasattr(runner, "cudagraph_dispatcher") and hasattr(runner, "_warmup_and_capture")


def planned_graphs(runner: Any) -> list[tuple[str, int]]:
    """Return mode and size of each graph that a capture would make, in its order."""
    descs = runner.cudagraph_dispatcher.get_capture_descs()
    return [(mode.name, desc.num_tokens) for mode, batches in descs for desc in batches]


def current_plan(runner: Any) -> CapturePlan:
    """Return the current plan, with the sizes that have a graph in it."""
    sizes = tuple(sorted({size for _, size in planned_graphs(runner)}))
    return CapturePlan(runner.compilation_config.cudagraph_mode.name, sizes)


def apply_plan(runner: Any, plan: CapturePlan) -> None:
    """Set what is captured next and what batches are padded to. All graphs must have been released."""
    from vllm.config import CUDAGraphMode

    config = runner.compilation_config
    config.cudagraph_mode = CUDAGraphMode[plan.mode]
    if plan.mode != EAGER:
        config.cudagraph_capture_sizes = list(plan.sizes)
        config.max_cudagraph_capture_size = plan.sizes[-1]
        config.compile_sizes = [size for size in config.compile_sizes or [] if size in plan.sizes]
    runner.cudagraph_batch_sizes = list(plan.sizes)
    clear_dispatch_keys(runner)
    initialize_dispatch_keys(runner)


def clear_dispatch_keys(runner: Any) -> None:
    """Have no batch dispatched to a graph: all run eagerly."""
    for dispatcher in _iterate_dispatchers(runner):
        for keys in dispatcher.cudagraph_keys.values():
            keys.clear()
        dispatcher.keys_initialized = False


def initialize_dispatch_keys(runner: Any) -> None:
    """Have batches dispatched to graphs by the current plan, as vllm-ascend's _check_and_update_cudagraph_mode does."""
    mode = runner.compilation_config.cudagraph_mode
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(mode, runner.uniform_decode_query_len)
    initialize_drafter_keys = getattr(getattr(runner, "drafter", None), "initialize_cudagraph_keys", None)
    if initialize_drafter_keys is not None:
        initialize_drafter_keys(mode)


def _iterate_dispatchers(runner: Any) -> Iterator[Any]:
    for owner in (runner, getattr(runner, "drafter", None)):
        dispatcher = getattr(owner, "cudagraph_dispatcher", None)
        if dispatcher is not None:
            yield dispatcher
