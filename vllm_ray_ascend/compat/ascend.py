"""What vllm-ascend knows of the hardware, by the names that 0.23 to 0.33 have in common; a fix of its scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_UPDATE_DRAFTS = "_update_pp_mtp_spec_token_ids"


def has_port_ranges() -> bool:
    """Return whether HCCL may be given port ranges: not on Atlas A2, whose fused communication does not take them."""
    from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

    return bool(get_ascend_device_type() != AscendDeviceType.A2)


def weight_nz_mode() -> int:
    """Return how vllm-ascend stores weights: 0 as PyTorch does. Only once it has checked a configuration."""
    from vllm_ascend.ascend_config import get_ascend_config

    return int(get_ascend_config().weight_nz_mode)


def block_reschedule_until_token(module: ModuleType) -> None:
    """Fix vllm-ascend's scheduling of pipelines, just imported as ``module``: patch/platform/patch_pp_mtp.py.

    A request whose next token is in flight is not scheduled (`next_decode_eligible_step`). vllm-ascend 0.30 lifts that
    with any output of the request, be it that of an earlier chunk of its prompt: the request is then decoded twice
    simultaneously, and its text is wrong wherever a prompt is longer than a batch. Here it stays until its token is
    there.
    """
    if hasattr(module, "_PP_IN_FLIGHT_STEP"):
        patches.wrap("vllm.v1.core.sched.scheduler.Scheduler.update_from_output", _with_decode_fence)
    else:
        _report_unread("_PP_IN_FLIGHT_STEP")


@functools.cache
def _report_unread(name: str) -> None:
    logger.warning(
        "VRA-192: vllm_ascend.patch.platform.patch_pp_mtp no longer has %s: this vllm-ascend schedules pipelines in a "
        "way that was not checked. Compare texts of long prompts with tensor parallelism alone, or install a "
        "vllm-ascend from 0.23 to 0.30 or a newer vllm-ray-ascend.",
        name,
    )


def _with_decode_fence(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        names = scheduler_output.num_scheduled_tokens
        fences = {name: self.requests[name].next_decode_eligible_step for name in names if name in self.requests}
        outputs = update(self, scheduler_output, *args, **kwargs)
        for name, fence in fences.items():
            request = self.requests.get(name)
            if request is not None and request.num_output_placeholders > 0:
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, fence)
        return outputs

    return update_from_output


def speculation_obstacle() -> str | None:
    """Return why vllm-ascend cannot draft tokens for a pipeline; None where nothing is known against it.

    vllm-ascend up to 0.30 asks StructuredOutputManager for `should_advance` after each step, which vLLM 0.30 has no
    more. With its successor `validate_tokens` in its place, n-gram drafts were accepted and the text was wrong.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    try:
        from vllm_ascend.patch.platform import patch_pp_mtp
    except ImportError:  # vllm-ascend 0.23 has no such module
        return None
    if (update := getattr(patch_pp_mtp, _UPDATE_DRAFTS, None)) is None:
        _report_unread(_UPDATE_DRAFTS)
        return None
    name = "should_advance"
    if name not in update.__code__.co_names or hasattr(StructuredOutputManager, name):
        return None
    return f"vllm-ascend's patch_pp_mtp asks vLLM's StructuredOutputManager for {name}, which it does not have"
