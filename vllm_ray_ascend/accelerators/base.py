"""Interface of an accelerator to the rest of the package. Only npu.py and cuda.py name a device's own modules.

torch.npu follows torch.cuda's names, so most of it is written once, over the module that a subclass names.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vllm_ray_ascend.accelerators.captures import CaptureTracker, track_captures
from vllm_ray_ascend.devices.kind import Kind

if TYPE_CHECKING:
    import torch


class DeviceMemory(NamedTuple):
    """Bytes of one device: ``free`` and ``total`` over all processes, ``allocated`` and ``reserved`` by this process's
    tensors."""

    free: int
    total: int
    allocated: int
    reserved: int


class Accelerator(ABC):
    """One kind of accelerator in this process. Devices are visible indices, as in ``npu:N``; methods import torch."""

    kind: ClassVar[Kind]
    """Ray's resource, and the variable with the list of visible devices."""
    name: ClassVar[str]
    """torch's name of the device, vLLM's name of the platform."""
    dist_backend: ClassVar[str]
    """torch.distributed's name of the backend whose groups move tensors between devices."""
    graph_target: ClassVar[str]
    """Name of `graph_class` in the table of patches."""

    def __init__(self) -> None:
        self.captures = CaptureTracker()

    @property
    @abstractmethod
    def torch_module(self) -> Any:
        """torch's module of the device."""

    @property
    @abstractmethod
    def graph_class(self) -> Any:
        """torch's class of captured graphs."""

    @abstractmethod
    def explain_error(self, error: BaseException | str) -> str | None:
        """Return meaning and remedy of an error of the device, its runtime or its communicators; None if unknown."""

    @abstractmethod
    def get_opened_device(self) -> int:
        """Return the index of the device that this thread has open, as the runtime reports it.

        Raises RuntimeError where the thread has none.
        """

    @abstractmethod
    def physical_device_id(self, index: int) -> int:
        """Return the number by which the node's driver counts the visible device ``index``."""

    @abstractmethod
    def destroy_platform_groups(self) -> None:
        """Destroy the groups that the platform has besides vLLM's. Call it before vLLM's are destroyed."""

    @abstractmethod
    def _clear_graphs(self, model_runner: Any) -> None:
        """Remove every reference to captured graphs."""

    def count_free_streams(self) -> int | None:
        """Return how many streams the driver has left for the calling thread's device; None where it does not report
        that."""
        return None

    def _release_capture_pool(self, pool: Any) -> None:  # noqa: B027  torch.cuda does so itself
        """Undo a failed capture's claim on its memory ``pool`` where torch does not."""

    def device_count(self) -> int:
        """Return how many devices this process sees."""
        return int(self.torch_module.device_count())

    def torch_device(self, index: int) -> torch.device:
        """Return torch's device with this index."""
        import torch

        return torch.device(self.name, index)

    def bind_thread(self, device: int | torch.device) -> None:
        """Set the device of the calling thread. Every thread that uses the device calls this first.

        The current device is per thread: without this call it is number 0, whatever the process's other threads use.
        """
        self.torch_module.set_device(device)

    def current_device(self) -> int:
        """Return the index of the calling thread's device."""
        return int(self.torch_module.current_device())

    def current_stream(self) -> Any:
        """Return the stream of the calling thread.

        vllm-ascend's utils.current_stream is another: one for the whole process.
        """
        return self.torch_module.current_stream()

    def create_stream(self) -> Any:
        """Create a stream on the calling thread's device."""
        return self.torch_module.Stream()

    def stream_context(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which the calling thread's work goes to ``stream``."""
        context: AbstractContextManager[Any] = self.torch_module.stream(stream)
        return context

    @contextmanager
    def fast_stream_context(self, stream: Any) -> Iterator[None]:
        """Do as `stream_context`, in a tenth of the time, for a stream of the device that the thread has set."""
        before = self.current_stream()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def set_stream(self, stream: Any) -> None:
        """Make ``stream`` the calling thread's. Needed after a failed capture: torch's context then keeps its own."""
        self.torch_module.set_stream(stream)

    def create_event(self, timed: bool = False) -> Any:
        """Create an event to record in a stream and wait for; ``timed`` ones can be compared by elapsed_time."""
        return self.torch_module.Event(enable_timing=timed)

    def synchronize(self) -> None:
        """Wait for all work on the calling thread's device."""
        self.torch_module.synchronize()

    def to_plain_format(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor contiguous and in a format that other devices know: a copy where it is not yet so."""
        return tensor.contiguous()

    def is_device_usable(self) -> bool:
        """Return whether the device still executes what this thread queues.

        After an error in torch_npu's task queue (of a call that it makes in another thread, as for a stream that joins
        a capture), torch_npu drops whatever is queued.
        """
        event = self.create_event()
        try:
            event.record()
            self.synchronize()
            return bool(event.query())
        except RuntimeError:
            return False

    def watch_captures(self) -> None:
        """Track every capture of this process from now on, and release the memory pool of one that fails.

        Call it once, before anything is captured; further calls do nothing.
        """
        create_pool = self.torch_module.graph_pool_handle
        track_captures(self.graph_class, self.graph_target, self.captures, create_pool, self._release_capture_pool)

    def is_capturing(self) -> bool:
        """Return whether a graph is being captured: by any thread that `watch_captures` tracks, or in this thread's
        stream."""
        return self.captures.in_progress or bool(self.torch_module.is_current_stream_capturing())

    @contextmanager
    def exclude_captures(self, what: str, limit_s: float = 0.0) -> Iterator[None]:
        """Keep captures out while the body does ``what``, work on the device that would break one.

        A capture that begins meanwhile waits for the end of the body, at least its ``limit_s`` seconds. Raises
        CaptureError where one is in progress already.
        """
        with self.captures.exclude_captures(what, limit_s):
            yield

    def release_graphs(self, model_runner: Any) -> None:
        """Destroy every captured graph, and return its memory and streams. Graphs are to be captured again before they
        are used."""
        self.synchronize()
        self._clear_graphs(model_runner)
        gc.collect()
        self.torch_module.empty_cache()

    def get_memory_info(self) -> DeviceMemory:
        """Return memory use of the calling thread's device, in bytes."""
        free, total = self.torch_module.mem_get_info()
        allocated, reserved = self.torch_module.memory_allocated(), self.torch_module.memory_reserved()
        return DeviceMemory(int(free), int(total), int(allocated), int(reserved))


def explain_with_causes(error: BaseException | str, explain: Callable[[str], str | None]) -> str | None:
    """Return the first explanation that ``explain`` has for the text of an error, or of its causes in turn."""
    if isinstance(error, str):
        return explain(error)
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        if (found := explain(str(each))) is not None:
            return found
        seen.add(id(each))
        each = each.__cause__ or each.__context__
    return None
