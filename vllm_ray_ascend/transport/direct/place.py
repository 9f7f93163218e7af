"""This process, as the direct transport's peers know it, and the NPU on which it receives."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import visible_of_physical
from vllm_ray_ascend.environment.driver import GROUPS
from vllm_ray_ascend.environment.node import prepare
from vllm_ray_ascend.errors import CaptureError, DeviceMappingError
from vllm_ray_ascend.settings import Settings, load
from vllm_ray_ascend.transport.hccl.limits import limit

if TYPE_CHECKING:
    from vllm_ray_ascend.accelerators.base import Accelerator

_LOOK_S = 0.05
_SHARE = 0.8
"""Of Ray's own limit, whose message names neither peer nor reason."""


@dataclass
class Here:
    """This process. ``limit_s`` is how long an object may take from its producer's end to the receiver."""

    accelerator: Accelerator
    settings: Settings
    host: str
    node_id: str
    who: str
    limit_s: float
    chosen: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, device: int) -> str:
        """One NPU of the cluster, in words that are the same in every process."""
        return f"NPU {self.accelerator.physical(device)} of node {self.host} ({self.node_id[:8]})"

    def device(self) -> int:
        """Visible number of the NPU on which this process receives: what `use_device` chose, or what Ray assigned.

        Raises DeviceMappingError where there is neither.
        """
        with self._lock:
            if self.chosen is None:
                self.chosen = self._assigned()
            return self.chosen

    def _assigned(self) -> int:
        import ray

        npu, ids = self.accelerator, ray.get_runtime_context().get_accelerator_ids().get(NPU.key, [])
        count = npu.device_count()
        if ids:
            # As the runtime sees it: Ray may have set the list after it was read, where a module imports torch_npu.
            return visible_of_physical([npu.physical(index) for index in range(count)], min(map(int, ids)))
        if count == 1:
            return 0
        raise DeviceMappingError(
            f"{self.who} sees {NPU.counted(count)} and was assigned none by Ray, so there is none to receive on. "
            'Create the actor with `@ray.remote(resources={"NPU": 1})`, or call '
            "vllm_ray_ascend.transport.direct.use_device(N) in it before the first object comes."
        )

    @contextlib.contextmanager
    def quiet(self, what: str, check: Callable[[], None]) -> Iterator[None]:
        """Around ``what``, work on the device, once no graph is captured. ``check`` is called till then."""
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(self.accelerator.guard(what))
                    break
                except CaptureError:
                    check()
                    time.sleep(_LOOK_S)
            yield


@functools.cache
def here() -> Here:
    """This process; the first call prepares HCCL's network settings of this node, where nobody did."""
    import ray
    from ray._private import ray_constants

    from vllm_ray_ascend.accelerators.choose import accelerator

    settings = load()
    host = ray.util.get_node_ip_address()
    if settings.node_env == "derive":
        prepare(host, groups=GROUPS[:1])
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    return Here(
        accelerator("npu"),
        settings,
        host,
        context.get_node_id(),
        f"{f'actor {actor[:12]}' if actor else 'the driver'} (pid {os.getpid()}, node {host})",
        min(limit(settings.transfer_limit_s, os.environ), _SHARE * ray_constants.RDT_FETCH_FAIL_TIMEOUT_SECONDS),
    )
