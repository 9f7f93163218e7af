"""Keeps captures of graphs and other work on the device apart: neither sees the other half way.

In the mode that torch uses, "global", a call that waits or allocates, from any thread of the process, breaks a capture
(CANN 107030, cudaErrorStreamCaptureUnsupported). The runtimes tell only whether the asking thread's stream captures.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_ray_ascend.errors import CaptureError

_MARK = "_vllm_ray_ascend_captures"
_POOL = "_vllm_ray_ascend_pool"
_WAIT_S = 60.0


class Captures:
    """Captures under way in this process, and the work that must not meet them."""

    def __init__(self, wait_s: float = _WAIT_S) -> None:
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._captures = 0
        self._work: list[tuple[int, str]] = []  # threads, and what they do

    @property
    def under_way(self) -> bool:
        """Whether a graph is being captured."""
        return self._captures > 0

    def begin(self) -> None:
        """A capture begins: no work is let in any more, and that of other threads has ended.

        Raises CaptureError where it goes on for longer than a capture waits.
        """
        own = threading.get_ident()
        with self._changed:
            self._captures += 1
            if not self._changed.wait_for(lambda: all(thread == own for thread, _ in self._work), self._wait_s):
                self._captures -= 1
                raise CaptureError(
                    f"No graph can be captured: for {self._wait_s:g} s another thread has used the device for "
                    f"{', '.join(what for thread, what in self._work if thread != own)}. End that first, or start with "
                    "--enforce-eager."
                )

    def end(self) -> None:
        """A capture has ended, well or not."""
        with self._changed:
            self._captures = max(0, self._captures - 1)

    @contextmanager
    def kept_out(self, what: str) -> Iterator[None]:
        """Around ``what``, work on the device that no capture may meet. Raises CaptureError while one is under way."""
        entry = (threading.get_ident(), what)
        with self._changed:
            if self._captures:
                raise CaptureError(
                    f"{what} would touch the device while a graph is captured, and break the capture. Do it before or "
                    "after the capture (compile_or_warm_up_model, wake_up), or start with --enforce-eager."
                )
            self._work.append(entry)
        try:
            yield
        finally:
            with self._changed:
                self._work.remove(entry)
                self._changed.notify_all()


def watch(graph_class: Any, captures: Captures, leave_pool: Callable[[Any], None]) -> None:
    """Tell ``captures`` of every capture by ``graph_class`` (torch's, so that vLLM's and subclasses count), once.

    Where one fails to begin or to end, ``leave_pool`` is called with the pool of memory that it was given.
    """
    begin, end = graph_class.capture_begin, graph_class.capture_end
    if getattr(begin, _MARK, None) is captures:
        return

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        captures.begin()
        setattr(self, _POOL, kwargs.get("pool", args[0] if args else None))
        try:
            return begin(self, *args, **kwargs)
        except BaseException:
            captures.end()
            _leave(self)
            raise

    @functools.wraps(end)
    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return end(self, *args, **kwargs)
        except BaseException:
            _leave(self)
            raise
        finally:
            captures.end()

    def _leave(graph: Any) -> None:
        pool = getattr(graph, _POOL, None)
        setattr(graph, _POOL, None)  # torch ends a capture that never began as well
        if pool is not None:
            leave_pool(pool)

    setattr(capture_begin, _MARK, captures)
    graph_class.capture_begin, graph_class.capture_end = capture_begin, capture_end
