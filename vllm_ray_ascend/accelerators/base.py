"""What the executor knows of an accelerator. Only npu.py and cuda.py name a device's own modules.

torch.npu follows torch.cuda's names, so most of it is written once, over the module that a subclass names.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vllm_ray_ascend.accelerators.captures import Captures, watch

if TYPE_CHECKING:
    import torch

    from vllm_ray_ascend.devices.kind import Kind


class Memory(NamedTuple):
    """Bytes of one device: free and in all, over every process; allocated and reserved by this one's tensors."""

    free: int
    total: int
    allocated: int
    reserved: int


class Accelerator(ABC):
    """One kind of accelerator in this process. Devices are visible indices, as in ``npu:N``; effects import torch."""

    kind: ClassVar[Kind]
    """How Ray calls it (its resource), and the variable with the list of visible devices."""
    name: ClassVar[str]
    """torch's name of the device, vLLM's name of the platform."""
    communicator: ClassVar[str]
    """torch.distributed's name of the backend whose groups move tensors between devices."""

    def __init__(self) -> None:
        self.captures = Captures()

    @property
    @abstractmethod
    def torch_module(self) -> Any:
        """torch's module of the device."""

    @property
    @abstractmethod
    def graph_class(self) -> Any:
        """torch's class of captured graphs."""

    @abstractmethod
    def explain(self, error: BaseException | str) -> str | None:
        """What an error of the device, its runtime or its communicators means and what mends it; None if unknown."""

    @abstractmethod
    def opened_device(self) -> int:
        """Index of the device that this thread has open, asked of the runtime. RuntimeError where it has none."""

    @abstractmethod
    def physical(self, index: int) -> int:
        """Number of a visible device as the node's driver counts."""

    @abstractmethod
    def leave_groups(self) -> None:
        """Destroy the groups that the platform has besides vLLM's, before vLLM's."""

    @abstractmethod
    def _drop_graphs(self, model_runner: Any) -> None:
        """Forget every captured graph, so that nothing refers to them any more."""

    def free_streams(self) -> int | None:
        """Streams that the driver still has for the calling thread's device; None where it does not tell."""
        return None

    def _leave_pool(self, pool: Any) -> None:  # noqa: B027  torch.cuda does so itself
        """Undo a failed capture's claim on its ``pool`` of memory where torch does not."""

    def device_count(self) -> int:
        """Devices that this process sees."""
        return int(self.torch_module.device_count())

    def device(self, index: int) -> torch.device:
        """torch's device with this index."""
        import torch

        return torch.device(self.name, index)

    def bind_thread(self, device: int | torch.device) -> None:
        """Set the device of the calling thread: the first thing that every thread does which touches one.

        The device is the thread's own; without this it is number 0, whatever the process's other threads use.
        """
        self.torch_module.set_device(device)

    def current_device(self) -> int:
        """Index of the device of the calling thread."""
        return int(self.torch_module.current_device())

    def current_stream(self) -> Any:
        """The stream of the calling thread. Not vllm-ascend's utils.current_stream, which is one for the process."""
        return self.torch_module.current_stream()

    def new_stream(self) -> Any:
        """A stream of the calling thread's device."""
        return self.torch_module.Stream()

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which the calling thread's work goes to ``stream``."""
        scope: AbstractContextManager[Any] = self.torch_module.stream(stream)
        return scope

    @contextmanager
    def in_stream(self, stream: Any) -> Iterator[None]:
        """As `on_stream`, for a stream of the device that the thread has set, and in a tenth of the time."""
        before = self.current_stream()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def set_stream(self, stream: Any) -> None:
        """Make ``stream`` the calling thread's: torch's context of a capture keeps its own where the capture fails."""
        self.torch_module.set_stream(stream)

    def new_event(self, timed: bool = False) -> Any:
        """An event to record in a stream and wait for; ``timed`` ones can be compared by elapsed_time."""
        return self.torch_module.Event(enable_timing=timed)

    def synchronise(self) -> None:
        """Wait for all work on the calling thread's device."""
        self.torch_module.synchronize()

    def check_transfer(self, work: Any) -> None:  # noqa: B027  torch tells of NCCL by itself
        """Raise RuntimeError where torch.distributed's ``work``, which has ended, did so by an error.

        Nothing is known of NCCL beyond what ``work.wait()`` raises: torch's watchdog ends the process.
        """

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its elements one after the other in memory, as other devices expect it: a copy if need be."""
        return tensor.contiguous()

    def works(self) -> bool:
        """Whether the device still does what this thread asks of it. After an error in torch_npu's task queue (of a
        call that it makes in another thread, as for a stream that joins a capture), it drops whatever is queued.
        """
        event = self.new_event()
        try:
            event.record()
            self.synchronise()
            return bool(event.query())
        except RuntimeError:
            return False

    def watch_captures(self) -> None:
        """Notice every capture of this process from now on, and tidy up after one that fails.

        Called once, before anything is captured.
        """
        watch(self.graph_class, self.captures, self._leave_pool)

    def capturing(self) -> bool:
        """Whether a graph is being captured, by any thread that `watch_captures` sees, or in this one's stream."""
        return self.captures.under_way or bool(self.torch_module.is_current_stream_capturing())

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Around ``what``, work of ours on the device: refused while a capture is under way, which it would break.

        A capture that begins meanwhile waits for its end. Raises CaptureError.
        """
        with self.captures.kept_out(what):
            yield

    def release_graphs(self, model_runner: Any) -> None:
        """Drop every captured graph, and give its memory and streams back. What uses graphs captures anew first."""
        self.synchronise()
        self._drop_graphs(model_runner)
        gc.collect()
        self.torch_module.empty_cache()

    def memory(self) -> Memory:
        """Memory of the calling thread's device."""
        free, total = self.torch_module.mem_get_info()
        allocated, reserved = self.torch_module.memory_allocated(), self.torch_module.memory_reserved()
        return Memory(int(free), int(total), int(allocated), int(reserved))


def explained(error: BaseException | str, explain: Callable[[str], str | None]) -> str | None:
    """The first explanation that ``explain`` has for an error's text, or for that of its causes in turn."""
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
