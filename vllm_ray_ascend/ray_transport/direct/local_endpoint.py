"""This process as its peers in the direct transport see it, and the NPU on which it receives."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import physical_to_visible
from vllm_ray_ascend.environment.driver import NETWORK_SETTINGS
from vllm_ray_ascend.environment.node import apply_network_settings
from vllm_ray_ascend.errors import CaptureError, DeviceMappingError, DirectTransportError
from vllm_ray_ascend.hccl.limits import transfer_limit_s
from vllm_ray_ascend.ray_transport.accelerator_context import share_npu_ports
from vllm_ray_ascend.settings import Settings, load

if TYPE_CHECKING:
    import torch

_POLL_S = 0.05
_RAY_LIMIT_SHARE = 0.8
"""Of Ray's own limit, whose message names neither peer nor reason."""


@dataclass
class LocalEndpoint:
    """This process. ``limit_s`` is how long an object may take from the end of its producer to the receiver."""

    accelerator: Accelerator
    settings: Settings
    host: str
    node_id: str
    process: str
    """Its description for peers and messages."""
    limit_s: float
    selected_device: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def describe_npu(self, device: int) -> str:
        """Return a description of an NPU that is the same in every process of the cluster."""
        return f"NPU {self.accelerator.physical_device_id(device)} of node {self.host} ({self.node_id[:8]})"

    def receive_device(self) -> int:
        """Return the visible index of the NPU on which this process receives: that of `use_device`, else Ray's.

        Raises DeviceMappingError where there is neither.
        """
        with self._lock:
            if self.selected_device is None:
                self.selected_device = self._assigned_device()
            return self.selected_device

    def common_device(self, tensors: Sequence[torch.Tensor]) -> torch.device:
        """Return the NPU of all tensors. Raises DirectTransportError where there is not exactly one."""
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        if len(devices) == 1 and (device := next(iter(devices))).type == self.accelerator.name:
            return device
        raise DirectTransportError(
            "VRA-530",
            f"The tensors of one object are on {', '.join(map(str, devices))}; this transport takes those of one NPU. "
            "Move them to it (`tensor.to('npu:N')`), return them as several objects, or without tensor_transport.",
        )

    def _assigned_device(self) -> int:
        import ray

        npu, ids = self.accelerator, ray.get_runtime_context().get_accelerator_ids().get(NPU.key, [])
        count = npu.device_count()
        if ids:
            # As the runtime sees it: Ray may have set the list after it was read, where a module imports torch_npu.
            usable_ids = [npu.physical_device_id(index) for index in range(count)]
            return physical_to_visible(usable_ids, min(map(int, ids)))
        if count == 1:
            return 0
        raise DeviceMappingError(
            "VRA-529",
            f"{self.process} sees {NPU.format_count(count)} and was assigned none by Ray, so there is none to receive "
            'on. Create the actor with `@ray.remote(resources={"NPU": 1})`, or call '
            "vllm_ray_ascend.ray_transport.direct.use_device(N) in it before it receives the first object.",
        )

    @contextlib.contextmanager
    def outside_captures(self, what: str, check: Callable[[], None]) -> Iterator[None]:
        """Run ``what``, work on the device, while no graph is captured; ``check`` is called until then."""
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self.accelerator.exclude_captures(what))
                    break
                except CaptureError:
                    check()
                    time.sleep(_POLL_S)
            yield


@functools.cache
def get_local_endpoint() -> LocalEndpoint:
    """Return this process; the first call sets HCCL's network variables of this node, unless they are set."""
    import ray
    from ray._private import ray_constants

    settings = load()
    host = ray.util.get_node_ip_address()
    if settings.node_env == "derive":
        apply_network_settings(host, groups=NETWORK_SETTINGS[:1])
    context = ray.get_runtime_context()
    share_npu_ports()
    actor = context.get_actor_id()
    return LocalEndpoint(
        get_accelerator("npu"),
        settings,
        host,
        context.get_node_id(),
        f"{f'actor {actor[:12]}' if actor else 'the driver'} (pid {os.getpid()}, node {host})",
        min(
            transfer_limit_s(settings.transfer_limit_s, os.environ),
            _RAY_LIMIT_SHARE * ray_constants.RDT_FETCH_FAIL_TIMEOUT_SECONDS,
        ),
    )
