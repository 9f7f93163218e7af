"""A capture that fails steps down instead of ending the engine, on all of its ranks alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.errors import GraphCaptureError
from vllm_ray_ascend.graphs import budget
from vllm_ray_ascend.graphs.groups import agree_on_least, communicators, is_first, vote
from vllm_ray_ascend.graphs.ladder import EAGER, Failure, Plan, step_down
from vllm_ray_ascend.graphs.reasons import Reason, short_of_streams, why
from vllm_ray_ascend.graphs.runner import State, change, load_of, make_keys, plan_of, planned, state_of, streams_of_one
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load, variable_of

logger = get_logger(__name__)

Capture = Callable[..., Any]


class _StoppedError(Exception):
    """Ends a capture of which one graph failed, on every rank."""


def with_steps_down(capture_model: Capture) -> Capture:
    """``capture_model`` of vllm-ascend's model runner, repeated with less until it succeeds."""

    @functools.wraps(capture_model)
    def stepping(runner: Any) -> Any:
        return _capture(runner, capture_model)

    return stepping


def with_vote(warmup_and_capture: Capture) -> Capture:
    """The function that warms up and captures one batch, after which all ranks learn whether it failed on any.

    A rank that went on alone would wait for the others in HCCL, in the next batch's warm-up.
    """

    @functools.wraps(warmup_and_capture)
    def voting(runner: Any, desc: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any) -> None:
        state, mode = state_of(runner), cudagraph_runtime_mode.name
        capture = functools.partial(warmup_and_capture, runner, desc, cudagraph_runtime_mode, *args, **kwargs)
        if not state.capturing:  # vLLM tries a few graphs to estimate their memory
            capture()
            return
        before = current().free_streams()
        verdict = vote(_shortage(runner, mode, before)) or vote(_attempt(capture))
        if verdict is None:
            state.captured += 1
            after = current().free_streams()
            if before is not None and after is not None:
                state.taken[mode] = before - after
            return
        state.failure = Failure(verdict.kind, state.captured, state.planned, desc.num_tokens)
        state.failure_text = verdict.text
        raise _StoppedError

    return voting


def _shortage(runner: Any, mode: str, free: int | None) -> Reason | None:
    """Too few streams for another graph like the last. To try would be worse: see `Accelerator.works`.

    Without steps down, the attempt itself decides.
    """
    if free is None or load().graph_step_down == "off":
        return None
    needed = state_of(runner).taken.get(mode)
    if needed is None:
        needed = streams_of_one(runner, mode, len(communicators().in_graphs))
    return None if free >= needed else short_of_streams(free, needed)


def _attempt(capture: Callable[[], Any]) -> Reason | None:
    """Why ``capture`` failed. The error itself is not kept: its frames hold the graph and tensors of it."""
    npu = current()
    stream = npu.current_stream()
    try:
        capture()
        npu.synchronise()
    except Exception as error:  # noqa: BLE001  every rank must come to the vote
        npu.set_stream(stream)
        reason = why(error)
        return reason if reason.kind == "fault" or npu.works() else reason._replace(kind="lost")
    return None


def _capture(runner: Any, capture_model: Capture) -> Any:
    state = state_of(runner)
    if state.released:
        make_keys(runner)
    asked = plan = plan_of(runner)
    if plan.sizes:
        plan = _budgeted(runner, plan)
    while True:
        done, result = _try(runner, state, capture_model)
        if done:
            break
        current().release_graphs(runner)
        plan = _lower(state, plan, asked)
        change(runner, plan)
    state.released = False
    if plan != asked and plan.mode == EAGER:
        _forbid_capture()
    return result


def _try(runner: Any, state: State, capture_model: Capture) -> tuple[bool, Any]:
    """Capture once. What is raised for another reason than a failed capture of ours is passed on."""
    state.begin(len(planned(runner)))
    try:
        return True, capture_model(runner)
    except Exception:
        if state.failure is None:
            raise
        return False, None
    finally:
        state.capturing = False


def _lower(state: State, plan: Plan, asked: Plan) -> Plan:
    """The next plan, logged. Raises GraphCaptureError where there is to be none."""
    failed, switch = state.failure, variable_of("graph_step_down")
    assert failed is not None
    story = (
        f"ACL graphs: size {failed.size} in mode {plan.mode} failed with {failed.captured} of {failed.planned} graphs "
        f"captured: {state.failure_text}."
    )
    if failed.kind == "fault":
        raise GraphCaptureError(f"{story} Fewer graphs would not help. --enforce-eager runs the model without graphs.")
    lower = step_down(plan, failed, asked)
    if failed.kind == "lost":
        raise GraphCaptureError(
            f"{story} torch_npu lets a process do no more on its NPU after an error in its task queue, so there is no "
            f"stepping down in this one. {_remedy(lower)}, or set {variable_of('graph_budget')}=fit."
        )
    if load().graph_step_down == "off":
        raise GraphCaptureError(f"{story} {_remedy(lower)}, or let {switch}=on step down by itself.")
    if is_first():
        logger.warning(
            "%s Stepping down: %s. %s=off makes this an error.", story, _described(lower, plan, asked), switch
        )
    return lower


def _described(lower: Plan, plan: Plan, asked: Plan) -> str:
    if lower.mode == EAGER:
        return "no graphs, every batch runs eagerly"
    if lower.mode != plan.mode:
        return f"mode {lower.mode}, graphs of decode batches only, sizes {_listed(lower.sizes)}"
    return f"fewer sizes, kept {len(lower.sizes)} of {len(asked.sizes)}: {_listed(lower.sizes)}"


def _remedy(lower: Plan) -> str:
    if lower.mode == EAGER:
        return "Run without graphs (--enforce-eager)"
    config = f'{{"cudagraph_mode": "{lower.mode}", "cudagraph_capture_sizes": {list(lower.sizes)}}}'
    return f"Capture less (--compilation-config '{config}')"


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _budgeted(runner: Any, plan: Plan) -> Plan:
    """The plan after the opt-in estimate of its streams, which warns of too many, or trims the sizes."""
    settings = load()
    if settings.graph_budget == "off":
        return plan
    groups = communicators()
    free = settings.graph_streams or current().free_streams()
    free = budget.assumed(len(groups.all)) if free is None else free
    available, least = agree_on_least(free, -budget.streams(load_of(runner, len(groups.in_graphs))))
    needed = -least
    fitting = budget.fit(plan.sizes, needed, available)
    if is_first():
        say = logger.info if fitting == plan.sizes else logger.warning
        say(
            "ACL graphs: %d sizes in mode %s take about %d streams (%s in each graph), %d are free%s",
            len(plan.sizes),
            plan.mode,
            needed,
            f"communicators {', '.join(groups.in_graphs)}" if groups.in_graphs else "no communicators",
            available,
            "" if fitting == plan.sizes else f". {_verdict(settings.graph_budget, plan, fitting)}",
        )
    if fitting == plan.sizes or settings.graph_budget == "warn":
        return plan
    trimmed = Plan(plan.mode, fitting)
    change(runner, trimmed)
    return trimmed


def _verdict(way: str, plan: Plan, fitting: tuple[int, ...]) -> str:
    if way == "fit":
        return f"Kept {len(fitting)} of {len(plan.sizes)} sizes: {_listed(fitting)}"
    return f"{_remedy(Plan(plan.mode, fitting))}, or set {variable_of('graph_budget')}=fit"


def _forbid_capture() -> None:
    """As vLLM does at the end of a capture: one that comes unawares is an error."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(False)
