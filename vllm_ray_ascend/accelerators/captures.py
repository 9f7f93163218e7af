"""Mutual exclusion of graph captures and other work on the device.

In the mode that torch uses, "global", a call that waits or allocates, from any thread of the process, breaks a capture
(CANN 107030, cudaErrorStreamCaptureUnsupported). The runtimes report only whether the calling thread's stream captures.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm_ray_ascend import patches
from vllm_ray_ascend.errors import CaptureError

_WORK_LIMIT_S = 60.0
"""Seconds for which a capture waits until other threads have finished their work on the device."""


class _Work(NamedTuple):
    """Work on the device in progress: by which thread, what, and until when at the latest where it may take long."""

    thread: int
    what: str
    deadline: float


class CaptureTracker:
    """Captures in progress in this process, and the work on the device that must not overlap with them."""

    def __init__(self, work_limit_s: float = _WORK_LIMIT_S) -> None:
        self._work_limit_s = work_limit_s
        self._changed = threading.Condition()
        self._captures = 0
        self._work: list[_Work] = []

    @property
    def in_progress(self) -> bool:
        """Whether a graph is being captured."""
        return self._captures > 0

    def begin_capture(self) -> None:
        """Register a capture: refuse further work, and wait until the work of other threads has ended.

        Raises CaptureError where that takes longer than the limit, or than the work itself may take.
        """
        own = threading.get_ident()
        with self._changed:
            self._captures += 1
            started = time.monotonic()
            deadline = max([started + self._work_limit_s, *(each.deadline for each in self._work)])
            while any(each.thread != own for each in self._work):
                if self._changed.wait(max(0.0, deadline - time.monotonic())):
                    continue
                self._captures -= 1
                others = ", ".join(each.what for each in self._work if each.thread != own)
                raise CaptureError(
                    "VRA-406",
                    f"No graph can be captured: for {time.monotonic() - started:.0f} s another thread has used the "
                    f"device for {others}. End that first, or start with --enforce-eager.",
                )

    def end_capture(self) -> None:
        """Unregister a capture that has ended or failed."""
        with self._changed:
            self._captures = max(0, self._captures - 1)

    @contextmanager
    def exclude_captures(self, what: str, limit_s: float = 0.0) -> Iterator[None]:
        """Keep captures out while the body does ``what``, which has a limit of ``limit_s`` seconds if it may take long.

        A capture waits for as long. Raises CaptureError where one is in progress already, unless this thread does such
        work already.
        """
        entry = _Work(threading.get_ident(), what, time.monotonic() + limit_s)
        with self._changed:
            if self._captures and not any(each.thread == entry.thread for each in self._work):
                raise CaptureError(
                    "VRA-407",
                    f"{what} would touch the device while a graph is captured, and break the capture. Do it before or "
                    "after the capture (compile_or_warm_up_model, wake_up), or start with --enforce-eager.",
                )
            self._work.append(entry)
        try:
            yield
        finally:
            with self._changed:
                self._work.remove(entry)
                self._changed.notify_all()


def track_captures(
    graph_class: Any,
    target: str,
    tracker: CaptureTracker,
    create_pool: Callable[[], Any],
    release_pool: Callable[[Any], None],
) -> None:
    """Have ``tracker`` notified of every capture by ``graph_class``. Further calls do nothing.

    ``target`` is the class's name in the table of patches. The class is torch's own, so that vLLM's use of it and
    subclasses count. Where a capture fails to begin or to end, ``release_pool`` is called with the memory pool that it
    was given. A capture that is given none gets one of ``create_pool``: torch would make one as well, which is
    known only after the capture.
    """

    def with_begin_tracked(begin: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(begin)
        def capture_begin(self: Any, pool: Any = None, *args: Any, **kwargs: Any) -> Any:
            tracker.begin_capture()
            try:
                self._vllm_ray_ascend_pool = create_pool() if pool is None else pool
                return begin(self, self._vllm_ray_ascend_pool, *args, **kwargs)
            except BaseException:  # whatever it is, no capture is in progress any more
                tracker.end_capture()
                _release_pool_of(self)
                raise

        return capture_begin

    def with_end_tracked(end: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(end)
        def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                ended = end(self, *args, **kwargs)
            except BaseException:  # whatever it is, nobody else frees the pool
                _release_pool_of(self)
                raise
            finally:
                tracker.end_capture()
            self._vllm_ray_ascend_pool = None  # from now on the graph's own, until it is reset
            return ended

        return capture_end

    def _release_pool_of(graph: Any) -> None:
        pool = getattr(graph, "_vllm_ray_ascend_pool", None)
        graph._vllm_ray_ascend_pool = None  # torch calls capture_end for a capture that never began as well
        if pool is not None:
            release_pool(pool)

    patches.wrap(f"{target}.capture_begin", with_begin_tracked, owner=graph_class)
    patches.wrap(f"{target}.capture_end", with_end_tracked, owner=graph_class)
