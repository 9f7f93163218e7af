"""Waits of Ray's channels that leave the processor to others.

Ray's readers give up their turn and ask again, as fast as they can (2.60, ReadAcquire): a thread for each end that is
read, and one more for each channel to another node. With fewer cores than those, steps crawl.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayChannelTimeoutError
from ray.experimental.channel.shared_memory_channel import Channel

from vllm_ray_ascend.compat.rebind import replace, upstream

_SPIN_S = 0.001
"""Ray's own wait, before ours: the next step of a busy engine mostly comes sooner."""
_SHARE = 0.05
"""Of the time waited so far, how long the next pause is: what it adds to a wait is no more."""
_LONGEST_S = 0.002
_LEAST = 19
_AGAIN_S = 0.2
_POLLERS = "worker.channel_"
"""How Linux names Ray's threads that wait for what a channel sends to another node: its 15 first letters."""


def install() -> None:
    """Have this process read Ray's channels with pauses."""
    replace(Channel, "read", _read)


def step_back_until(open_: threading.Event) -> None:
    """`step_back`, from now on and again, until all channels are ``open_``: Ray opens them one by one."""

    def again() -> None:
        while not open_.wait(_AGAIN_S):
            step_back()
        step_back()

    threading.Thread(target=again, daemon=True, name="RayAscendPatience").start()


def step_back() -> None:
    """Give Ray's pollers the lowest priority: with an idle core they are as fast as ever, else the work goes first."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # one that ends meanwhile
            if (thread / "comm").read_text().strip() == _POLLERS:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), _LEAST)


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
