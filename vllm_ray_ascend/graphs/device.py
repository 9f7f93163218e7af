"""What this room asks of torch_npu itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable
from typing import Any

_TRIES = 4


def current_stream() -> Any:
    """The current stream of this thread."""
    import torch

    return torch.npu.current_stream()


def restore_stream(stream: Any) -> None:
    """Make ``stream`` the current one again: torch.npu.graph keeps its own where a capture fails to begin or to end."""
    import torch

    torch.npu.set_stream(stream)


def synchronize() -> None:
    """Wait for all streams of this NPU."""
    import torch

    torch.npu.synchronize()


def drop_unused_memory() -> None:
    """Give back to the NPU what nothing uses. Collects garbage first: errors hold frames with tensors."""
    import torch

    gc.collect()
    torch.npu.empty_cache()


def leave_pool(pool: Any) -> None:
    """Undo a capture's claim on the memory ``pool`` where torch_npu does not: where it failed to begin or to end.

    Else that memory is never given back. After a failure to begin, torch_npu's allocator of pinned memory still takes
    the pool as being recorded into, out of reach, and refuses further captures ("already recording to mempool_id"):
    these have to use a new one.
    """
    import torch
    import torch_npu

    device = torch.npu.current_device()
    with contextlib.suppress(RuntimeError):  # ended already, where the capture did begin
        torch_npu._C._npu_endAllocateToPool(device, pool)
    torch_npu._C._npu_releasePool(device, pool)


def record_all(events: Iterable[Any], waiting: Iterable[Any]) -> None:
    """Record ``events`` on a stream that is none of ``waiting``, which would never come to it."""
    import torch

    taken = {stream.npu_stream for stream in waiting}
    rescue = next((each for _ in range(_TRIES) if (each := torch.npu.Stream()).npu_stream not in taken), None)
    if rescue is None:
        raise RuntimeError("torch_npu gives out no stream but those that wait")
    for event in events:
        event.record(rescue)


def free_streams() -> int | None:
    """Streams that the driver still has for this NPU; None where it does not tell (CANN before 8.5)."""
    try:
        ask = ctypes.CDLL("libascendcl.so").aclrtGetStreamAvailableNum
    except (OSError, AttributeError):
        return None
    count = ctypes.c_uint32()
    return int(count.value) if ask(ctypes.byref(count)) == 0 else None
