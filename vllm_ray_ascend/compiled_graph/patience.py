"""Waits of Ray's channels that leave the processor to others.

Ray's readers give up their turn and ask again, as fast as they can (2.60, ReadAcquire), a core each. So do its threads
that wait for what goes to another node, which nothing here reaches: a lower priority starves everything else instead
(Linux 6.18, where each turn given up counts the more the lower the priority is).
"""

from __future__ import annotations

import time
from typing import Any

from ray.exceptions import RayChannelTimeoutError
from ray.experimental.channel.shared_memory_channel import Channel

from vllm_ray_ascend.compat.rebind import replace, upstream

_SPIN_S = 0.001
"""Ray's own wait, before ours: the next step of a busy engine mostly comes sooner."""
_SHARE = 0.05
"""Of the time waited so far, how long the next pause is: what it adds to a wait is no more."""
_LONGEST_S = 0.002


def install() -> None:
    """Have this process read Ray's channels with pauses."""
    replace(Channel, "read", _read)


def pause_after(waited_s: float) -> float:
    """Seconds until the next look, after a wait of so many."""
    return min(_LONGEST_S, _SHARE * waited_s)


def _read(self: Any, timeout: float | None = None) -> Any:
    """As Ray's, which raises RayChannelTimeoutError after ``timeout`` seconds; None and -1 are for ever."""
    read, began = upstream(Channel, "read"), time.monotonic()
    limit_s = float("inf") if timeout is None or timeout == -1 else timeout
    look_s = min(_SPIN_S, limit_s)
    while True:
        try:
            return read(self, look_s)
        except RayChannelTimeoutError:
            waited_s = time.monotonic() - began
            if waited_s >= limit_s:
                raise
        time.sleep(min(pause_after(waited_s), limit_s - waited_s))
        look_s = 0.0
