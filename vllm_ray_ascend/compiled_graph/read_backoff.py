"""Reads of Ray's channels that pause while they wait, and leave the processor to others.

Ray's readers yield and try again as fast as they can (2.60, ReadAcquire), on a core each. So do its threads that wait
for messages to another node, which cannot be reached from here: a lower priority would starve everything else (Linux
6.18, where each yield counts the more the lower the priority is).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayChannelTimeoutError

from vllm_ray_ascend import patches

_SPIN_S = 0.001
"""Seconds of Ray's own wait before the first pause: the next step of a busy engine mostly comes sooner."""
_PAUSE_SHARE = 0.05
"""Of the time waited so far, the length of the next pause, so the most by which pauses prolong a wait."""
_MAX_PAUSE_S = 0.002


def install() -> None:
    """Have this process read Ray's channels with pauses. May be called again."""
    patches.wrap("ray.experimental.channel.shared_memory_channel.Channel.read", with_pauses)


def next_pause_s(waited_s: float) -> float:
    """Return the seconds until the next try, after a wait of ``waited_s`` seconds."""
    return min(_MAX_PAUSE_S, _PAUSE_SHARE * waited_s)


def with_pauses(read: Callable[..., Any]) -> Callable[..., Any]:
    """Return Ray's ``Channel.read``, with pauses between tries."""

    @functools.wraps(read)
    def read_with_pauses(self: Any, timeout: float | None = None) -> Any:
        """Raise RayChannelTimeoutError after ``timeout`` seconds; None and -1 mean no limit."""
        began = time.monotonic()
        limit_s = float("inf") if timeout is None or timeout == -1 else timeout
        try_s = min(_SPIN_S, limit_s)
        while True:
            try:
                return read(self, try_s)
            except RayChannelTimeoutError:
                waited_s = time.monotonic() - began
                if waited_s >= limit_s:
                    raise
            time.sleep(min(next_pause_s(waited_s), limit_s - waited_s))
            try_s = 0.0

    return read_with_pauses
