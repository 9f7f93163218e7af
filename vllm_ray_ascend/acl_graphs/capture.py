"""A failed capture falls back to fewer graphs instead of ending the engine, in the same way on all of its ranks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.acl_graphs.capture_errors import FailureCause, classify, stream_shortage
from vllm_ray_ascend.acl_graphs.consensus import agree_on_failure, is_first_rank
from vllm_ray_ascend.acl_graphs.fallback import EAGER, CaptureFailure, CapturePlan, step_down
from vllm_ray_ascend.acl_graphs.runner import (
    CaptureState,
    apply_plan,
    current_plan,
    get_capture_state,
    initialize_dispatch_keys,
    planned_graphs,
)
from vllm_ray_ascend.errors import GraphCaptureError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS, GRAPH_FALLBACK, GRAPHS_CAPTURED
from vllm_ray_ascend.settings import load, variable_of

logger = get_logger(__name__)

CaptureFunction = Callable[..., Any]


class _CaptureStoppedError(Exception):
    """Raised on every rank to end a capture of which one graph failed on some rank."""


def with_fallback(capture_model: CaptureFunction) -> CaptureFunction:
    """Return ``capture_model`` of vllm-ascend's model runner, repeated with fewer graphs until it succeeds."""

    @functools.wraps(capture_model)
    def capture_with_fallback(runner: Any) -> Any:
        return _capture_until_success(runner, capture_model)

    return capture_with_fallback


def with_consensus(warmup_and_capture: CaptureFunction) -> CaptureFunction:
    """Return the function that warms up and captures one batch, after which all ranks know whether any rank failed.

    A rank that continued alone would wait for the others in HCCL, in the next batch's warm-up.
    """

    @functools.wraps(warmup_and_capture)
    def capture_with_consensus(runner: Any, desc: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any) -> None:
        state, mode = get_capture_state(runner), cudagraph_runtime_mode.name
        capture = functools.partial(warmup_and_capture, runner, desc, cudagraph_runtime_mode, *args, **kwargs)
        if not state.capturing:  # vLLM captures a few graphs to estimate their memory
            capture()
            return
        before = current_accelerator().count_free_streams()
        cause = agree_on_failure(_check_free_streams(runner, mode, before))
        cause = cause or agree_on_failure(_try_capture_graph(capture))
        if cause is None:
            state.captured += 1
            after = current_accelerator().count_free_streams()
            if before is not None and after is not None:
                state.streams_used[mode] = before - after
            return
        state.failure = CaptureFailure(cause.kind, state.captured, state.planned, desc.num_tokens)
        state.failure_text = cause.text
        raise _CaptureStoppedError

    return capture_with_consensus


def _check_free_streams(runner: Any, mode: str, free: int | None) -> FailureCause | None:
    """Return a failure where there are too few streams for another graph like the last one.

    An attempt could make the device unusable: see `Accelerator.is_device_usable`. Without fallback, the attempt itself
    decides.
    """
    if free is None or load().graph_step_down == "off":
        return None
    needed = get_capture_state(runner).streams_used.get(mode)
    if needed is None:
        layers: int = runner.model_config.get_num_layers(runner.parallel_config)
        on_vector_cores = os.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV"
        needed = estimate_streams(mode, layers, count_graph_communicators(), on_vector_cores)
    return None if free >= needed else stream_shortage(free, needed)


def estimate_streams(mode: str, layers: int, communicators: int, on_vector_cores: bool = False) -> int:
    """Return how many streams one batch's graphs in ``mode``, FULL or PIECEWISE, should take.

    For as long as it lives, a graph holds a stream, and for each communicator that it uses one stream (where AI vector
    cores carry HCCL: HCCL_OP_EXPANSION_MODE=AIV) or two. In pieces, a batch is a graph for each layer and one more.
    This is the core of the formula by which vllm-ascend trimmed its sizes until 0.23 (`update_aclgraph_sizes`); newer
    drivers share streams between graphs, so it serves only for the first graph of a mode, as an upper bound.
    """
    graphs = 1 if mode == "FULL" else layers + 1
    return graphs * (1 + communicators * (1 if on_vector_cores else 2))


def count_graph_communicators() -> int:
    """Return how many live groups of this rank have an HCCL communicator that graphs use.

    HCCL creates a communicator at its first use, and the warm-up before the capture uses all that are needed. Pipeline
    stages send and receive between graphs, the world's group synchronises: no graph contains either.
    """
    from vllm.distributed import parallel_state

    outside = (parallel_state._WORLD, parallel_state._PP)
    groups: list[Any] = [reference() for reference in list(parallel_state._groups.values())]
    return sum(
        group is not None and group.world_size > 1 and group not in outside and _has_communicator(group)
        for group in groups
    )


def _has_communicator(group: Any) -> bool:
    try:
        backend = group.device_group._get_backend(current_accelerator().torch_device(group.local_rank))
        return bool(backend.get_hccl_comm_name(group.rank_in_group, init_comm=False))
    except RuntimeError:  # a group without a backend for the device
        return group.device_group is not None
    except (AttributeError, TypeError) as error:  # another torch_npu: too many counted is better than too few
        _report_uncounted(str(error))
        return group.device_group is not None


@functools.cache
def _report_uncounted(error: str) -> None:
    logger.warning(
        "VRA-191: torch_npu does not say which groups have a communicator (%s), so that all are counted, and graphs "
        "may be left out for which there are streams. Install a torch_npu from 2.10 to 2.14 or a newer "
        "vllm-ray-ascend.",
        error,
    )


def _try_capture_graph(capture: Callable[[], Any]) -> FailureCause | None:
    """Capture one graph; return why that failed. The error itself is not kept: its frames hold the graph's tensors."""
    accelerator = current_accelerator()
    stream = accelerator.current_stream()
    try:
        capture()
        accelerator.synchronize()
    except Exception as error:  # noqa: BLE001  every rank must take part in the vote, whatever failed
        accelerator.set_stream(stream)
        cause = classify(error)
        if cause.kind == "program_error" or accelerator.is_device_usable():
            return cause
        return cause._replace(kind="device_unusable")
    return None


def _capture_until_success(runner: Any, capture_model: CaptureFunction) -> Any:
    state = get_capture_state(runner)
    if state.released:
        initialize_dispatch_keys(runner)
    requested = plan = current_plan(runner)
    while True:
        done, result = _try_capture_model(runner, state, capture_model)
        if done:
            break
        current_accelerator().release_graphs(runner)
        plan = _choose_next_plan(state, plan, requested)
        apply_plan(runner, plan)
    state.released = False
    if is_first_rank():
        EVENTS.emit(GRAPHS_CAPTURED, graphs=state.captured, mode=plan.mode)
    if plan != requested and plan.mode == EAGER:
        _disable_capture()
    return result


def _try_capture_model(runner: Any, state: CaptureState, capture_model: CaptureFunction) -> tuple[bool, Any]:
    """Capture once; return whether that succeeded, and its result. Errors other than a failed graph are passed on."""
    state.begin_capture(len(planned_graphs(runner)))
    try:
        return True, capture_model(runner)
    except Exception:  # any error that follows a failed graph counts as that failure
        if state.failure is None:
            raise
        return False, None
    finally:
        state.capturing = False


def _choose_next_plan(state: CaptureState, plan: CapturePlan, requested: CapturePlan) -> CapturePlan:
    """Return the plan after ``plan`` failed, and log it. Raises GraphCaptureError where there is to be none."""
    failure, switch = state.failure, variable_of("graph_step_down")
    assert failure is not None
    what = (
        f"ACL graphs: size {failure.size} in mode {plan.mode} failed with {failure.captured} of {failure.planned} "
        f"graphs captured: {state.failure_text}."
    )
    if failure.kind == "program_error":
        raise GraphCaptureError(
            "VRA-401", f"{what} Fewer graphs would not help. --enforce-eager runs the model without graphs."
        )
    lower = step_down(plan, failure, requested)
    if failure.kind == "device_unusable":
        raise GraphCaptureError(
            "VRA-402",
            f"{what} After an error in its task queue torch_npu rejects all further work of the process, which "
            f"therefore cannot fall back to fewer graphs. {_advise_plan(lower)}.",
        )
    if load().graph_step_down == "off":
        raise GraphCaptureError("VRA-403", f"{what} {_advise_plan(lower)}, or set {switch}=on to step down by itself.")
    if is_first_rank():
        logger.warning(
            "VRA-404: %s Stepping down: %s. %s=off makes this an error.",
            what,
            _describe_step(lower, plan, requested),
            switch,
        )
        kept = len(lower.sizes) if lower.mode != EAGER else 0
        EVENTS.emit(GRAPH_FALLBACK, reason=state.failure_text, mode=lower.mode, graphs=kept)
    return lower


def _describe_step(lower: CapturePlan, plan: CapturePlan, requested: CapturePlan) -> str:
    if lower.mode == EAGER:
        return "no graphs, every batch runs eagerly"
    if lower.mode != plan.mode:
        return f"mode {lower.mode}, graphs of decode batches only, sizes {_format_sizes(lower.sizes)}"
    return f"fewer sizes, kept {len(lower.sizes)} of {len(requested.sizes)}: {_format_sizes(lower.sizes)}"


def _advise_plan(lower: CapturePlan) -> str:
    if lower.mode == EAGER:
        return "Run without graphs (--enforce-eager)"
    config = f'{{"cudagraph_mode": "{lower.mode}", "cudagraph_capture_sizes": {list(lower.sizes)}}}'
    return f"Capture fewer graphs (--compilation-config '{config}')"


def _format_sizes(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _disable_capture() -> None:
    """Do as vLLM at the end of a capture: from now on an unexpected capture is an error."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(False)
