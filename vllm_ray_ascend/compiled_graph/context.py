"""What Ray's channels of a worker need to know of its device."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ray.experimental.channel import ChannelContext
from ray.experimental.channel.accelerator_context import AcceleratorContext

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.transport import context
from vllm_ray_ascend.transport.pipeline import HcclPPCommunicator

if TYPE_CHECKING:
    import torch


class WorkerContext(AcceleratorContext):  # type: ignore[misc]  # Ray tells no types
    """The device that vLLM's worker has open. Ray looks for it in lists that are not set under NOSET."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type, HcclPPCommunicator)
        self._device = device
        self._bound = threading.local()

    def get_accelerator_devices(self) -> list[torch.device]:
        """The one device."""
        return [self._device]

    def get_device_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Set the thread's device for good: Ray's own context would set it back to number 0, which is another's."""
        if not getattr(self._bound, "yes", False):
            current().bind_thread(self._device)
            self._bound.yes = True
        return nullcontext()

    @property
    def accelerator_count(self) -> int:
        """Ray refuses an actor that has none."""
        return 1


def use_device(device: torch.device) -> None:
    """Have the channels of this process use ``device``. A tensor on another one goes through host memory."""
    context.install()
    AcceleratorContext.set(WorkerContext(device))
    ChannelContext.get_current().set_torch_device(device)
