"""What vllm-ascend knows of the hardware, by the names that 0.23 to 0.33 have in common."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

_MENDED = "_vllm_ray_ascend_keeps_fence"


def has_port_ranges() -> bool:
    """Whether HCCL may be given port ranges: not on Atlas A2, where CANN's fused communication does not take them."""
    from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

    return bool(get_ascend_device_type() != AscendDeviceType.A2)


def keep_fence(module: ModuleType) -> None:
    """Mend vllm-ascend's scheduling of pipelines, just imported as ``module``: patch/platform/patch_pp_mtp.py.

    A request whose next token is under way is not scheduled (`next_decode_eligible_step`). vllm-ascend 0.30 lifts that
    with any output of the request, be it that of an earlier chunk of its prompt: the request is then decoded twice at
    once, and its text is wrong wherever a prompt is longer than a batch. Here it stays until its token is there.
    Removable when vllm-ascend asks for placeholders itself.
    """
    if not hasattr(module, "_PP_IN_FLIGHT_STEP"):
        return
    from vllm.v1.core.sched.scheduler import Scheduler

    patched = Scheduler.update_from_output
    if hasattr(patched, _MENDED):
        return

    @functools.wraps(patched)
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        names = scheduler_output.num_scheduled_tokens
        fences = {name: self.requests[name].next_decode_eligible_step for name in names if name in self.requests}
        outputs = patched(self, scheduler_output, *args, **kwargs)
        for name, fence in fences.items():
            request = self.requests.get(name)
            if request is not None and request.num_output_placeholders > 0:
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, fence)
        return outputs

    setattr(update_from_output, _MENDED, True)
    Scheduler.update_from_output = update_from_output
