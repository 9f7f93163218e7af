"""One thread of the process looks after its communicators: nobody waits for a send, yet a late one is to be noticed."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

_EVERY_S = 0.5


class Watched(Protocol):
    """A communicator, as far as the watch knows it."""

    @property
    def ended(self) -> str | None:
        """Why there is nothing more to look after."""

    def look(self) -> None:
        """Look for transfers that are late or have failed."""


_lock = threading.Lock()
_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_thread: threading.Thread | None = None


def watch(group: Watched) -> None:
    """Look after ``group`` until it has ended or is forgotten."""
    global _thread
    with _lock:
        _watched.add(group)
        if _thread is None:
            _thread = threading.Thread(target=_look, name="hccl-watch", daemon=True)
            _thread.start()


def _look() -> None:
    global _thread
    while True:
        time.sleep(_EVERY_S)
        with _lock:
            groups = [group for group in _watched if group.ended is None]
            if not groups:
                _thread = None
                return
        while groups:  # and keep none alive
            groups.pop().look()
