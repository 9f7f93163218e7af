"""A thread that polls the communicators of this process: nobody waits for a send, yet a late one has to be noticed."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

_INTERVAL_S = 0.5


class Watched(Protocol):
    """A communicator as the watchdog sees it."""

    @property
    def end_reason(self) -> str | None:
        """Why the communicator has ended; None while it is usable."""

    def poll(self) -> None:
        """Check for transfers that are late or have failed."""


_lock = threading.Lock()
_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_thread: threading.Thread | None = None


def watch_group(group: Watched) -> None:
    """Poll ``group`` until it has ended or is garbage collected."""
    global _thread
    with _lock:
        _watched.add(group)
        if _thread is None:
            _thread = threading.Thread(target=_poll_groups, name="RayAscendHcclWatchdog", daemon=True)
            _thread.start()


def _poll_groups() -> None:
    global _thread
    while True:
        time.sleep(_INTERVAL_S)
        with _lock:
            groups = [group for group in _watched if group.end_reason is None]
            if not groups:
                _thread = None
                return
        while groups:  # popped, so that the sleep keeps no communicator alive
            groups.pop().poll()
