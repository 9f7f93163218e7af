"""The graphs of vllm-ascend's default model runner ("V1"): what is planned, and a change of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_ray_ascend.graphs.budget import Load, streams
from vllm_ray_ascend.graphs.ladder import EAGER, Failure, Plan

_STATE = "_vllm_ray_ascend_graphs"


@dataclass
class State:
    """What this room knows of one model runner."""

    capturing: bool = False
    captured: int = 0
    planned: int = 0
    failure: Failure | None = None
    failure_text: str = ""
    released: bool = False
    taken: dict[str, int] = field(default_factory=dict)
    """Streams that the last graph of each mode took."""

    def begin(self, planned: int) -> None:
        """A capture of ``planned`` graphs begins."""
        self.capturing, self.captured, self.planned, self.failure = True, 0, planned, None
        self.taken.clear()


def state_of(runner: Any) -> State:
    """The state of ``runner``, kept on itself."""
    state = getattr(runner, _STATE, None)
    if state is None:
        state = State()
        setattr(runner, _STATE, state)
    return state


def is_supported(runner: Any) -> bool:
    """Whether ``runner`` is the one that vllm-ascend uses by default; its second one keeps its graphs elsewhere."""
    return hasattr(runner, "cudagraph_dispatcher") and hasattr(runner, "_warmup_and_capture")


def planned(runner: Any) -> list[tuple[str, int]]:
    """Mode and size of each graph that a capture would make, in its order."""
    descs = runner.cudagraph_dispatcher.get_capture_descs()
    return [(mode.name, desc.num_tokens) for mode, batches in descs for desc in batches]


def plan_of(runner: Any) -> Plan:
    """The present plan, of those sizes that have a graph in it."""
    sizes = tuple(sorted({size for _, size in planned(runner)}))
    return Plan(runner.compilation_config.cudagraph_mode.name, sizes)


def load_of(runner: Any, groups: int) -> Load:
    """What a capture would have to hold, with ``groups`` communicators in each graph."""
    on_vector_cores = os.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV"
    modes = [mode for mode, _ in planned(runner)]
    layers: int = runner.model_config.get_num_layers(runner.parallel_config)
    return Load(modes.count("FULL"), modes.count("PIECEWISE"), layers, groups, on_vector_cores)


def streams_of_one(runner: Any, mode: str, groups: int) -> int:
    """Streams that a batch's graphs in ``mode`` should take, by the estimate."""
    every = load_of(runner, groups)
    return streams(every._replace(whole=int(mode == "FULL"), in_pieces=int(mode == "PIECEWISE")))


def change(runner: Any, plan: Plan) -> None:
    """Let ``plan`` be what is captured next and what batches are padded to. No graph may be there."""
    from vllm.config import CUDAGraphMode

    config = runner.compilation_config
    config.cudagraph_mode = CUDAGraphMode[plan.mode]
    if plan.mode != EAGER:
        config.cudagraph_capture_sizes = list(plan.sizes)
        config.max_cudagraph_capture_size = plan.sizes[-1]
        config.compile_sizes = [size for size in config.compile_sizes or [] if size in plan.sizes]
    runner.cudagraph_batch_sizes = list(plan.sizes)
    forget_keys(runner)
    make_keys(runner)


def forget_keys(runner: Any) -> None:
    """Let no batch be dispatched to a graph: all run eagerly."""
    for dispatcher in _dispatchers(runner):
        for keys in dispatcher.cudagraph_keys.values():
            keys.clear()
        dispatcher.keys_initialized = False


def make_keys(runner: Any) -> None:
    """Let batches be dispatched to graphs by the present plan, as in vllm-ascend's _check_and_update_cudagraph_mode."""
    mode = runner.compilation_config.cudagraph_mode
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(mode, runner.uniform_decode_query_len)
    make_those_of_drafter = getattr(getattr(runner, "drafter", None), "initialize_cudagraph_keys", None)
    if make_those_of_drafter is not None:
        make_those_of_drafter(mode)


def _dispatchers(runner: Any) -> Iterator[Any]:
    for owner in (runner, getattr(runner, "drafter", None)):
        dispatcher = getattr(owner, "cudagraph_dispatcher", None)
        if dispatcher is not None:
            yield dispatcher
