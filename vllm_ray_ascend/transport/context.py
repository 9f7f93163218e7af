"""Ray's accelerator context, for NPUs: right devices, threads on them, and host copies that are noticed.

Ray makes the contexts of actors itself, of its own class with our communicator's, so a subclass of ours would not get
there. What NPUs need is therefore put into Ray's classes, for contexts named "npu" only, in each process that imports
transport.communicator; Ray pickles its class by name, so each actor of a graph does that first of all.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ray
from ray.experimental.channel import ChannelContext
from ray.experimental.channel.accelerator_context import AcceleratorContext
from ray.experimental.channel.serialization_context import _SerializationContext
from ray.experimental.channel.torch_tensor_accelerator_channel import TorchTensorAcceleratorChannel

from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.environment.driver import GROUPS
from vllm_ray_ascend.environment.node import prepare
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load
from vllm_ray_ascend.transport.assigned import assigned_devices

logger = get_logger(__name__)

NAME = "npu"
"""torch's name of the device, and so Ray's of the context."""

_MARK = "_vllm_ray_ascend"
_CATCH_UP = "_vllm_ray_ascend_catch_up"
_OF_A_MESSAGE = {
    "_use_external_transport": bool,
    "_out_of_band_tensors": list,
    "_deserialized_tensor_placeholders": set,
}
"""What Ray's one serialisation context of a process keeps of the message at hand."""


class HostCopies(NamedTuple):
    """NPU tensors of this process that Ray has taken through host memory."""

    tensors: int
    bytes: int


class _Copies:
    """Counts host copies, and says so once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.so_far = HostCopies(0, 0)

    def count(self, tensor: Any) -> None:
        with self._lock:
            first = not self.so_far.tensors
            size = tensor.numel() * tensor.element_size()
            self.so_far = HostCopies(self.so_far.tensors + 1, self.so_far.bytes + size)
        if first:
            logger.warning(
                "Ray takes an NPU tensor (%s%s on %s) through host memory. Where it goes to another actor, call "
                "vllm_ray_ascend.transport.register() in the driver and annotate its node with "
                'with_tensor_transport("hccl")%s. Further ones are counted, not told: '
                "vllm_ray_ascend.transport.context.host_copies().",
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                tensor.device,
                _of_another_device(tensor),
            )


_copies = _Copies()


def host_copies() -> HostCopies:
    """How many NPU tensors Ray has copied through host memory in this process: none should be but for the driver."""
    return _copies.so_far


class NpuContext(AcceleratorContext):  # type: ignore[misc]
    """The driver's context. A driver needs no NPU: torch's module is looked for when it is used."""

    def __init__(self, communicator_cls: type) -> None:
        self._torch_module_name = NAME
        self._communicator_cls = communicator_cls

    @property
    def _torch_mod(self) -> Any:
        return accelerator(NAME).torch_module


def install() -> None:
    """Put into Ray's classes what NPUs need there; once for a process, and any number of times."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # a driver without an NPU
        _ = accelerator(NAME).torch_module
    for holder, name, ours in (
        (AcceleratorContext, "get_accelerator_devices", _get_accelerator_devices),
        (AcceleratorContext, "get_device_context", _get_device_context),
        (AcceleratorContext, "current_stream", _current_stream),
        (_SerializationContext, "serialize_to_numpy_or_scalar", _serialize_to_numpy_or_scalar),
        (TorchTensorAcceleratorChannel, "write", _write),
    ):
        if getattr(getattr(holder, name), _MARK, None) is None:
            replace(holder, name, _instead(holder, name, ours))
    for name, new in _OF_A_MESSAGE.items():
        if name not in vars(_SerializationContext):
            setattr(_SerializationContext, name, _OfThread(new))


def own_device() -> Any:
    """torch's device of this actor, with its index: what was set in Ray's channel context, or what Ray assigned.

    Ray keeps the first answer, "cpu" for an actor that was in a graph before there was a context for NPUs.
    """
    context = ChannelContext.get_current()
    device = context._torch_device
    if device is None or device.type != NAME:
        device = AcceleratorContext.get().get_accelerator_devices()[0]
    elif device.index is None:
        device = accelerator(NAME).device(accelerator(NAME).current_device())
    context.set_torch_device(device)
    return device


def prepare_network() -> None:
    """Have HCCL listen where Ray does, as for vLLM's workers, unless the user has said where."""
    if load().node_env == "derive":
        for note in prepare(str(ray.util.get_node_ip_address()), groups=GROUPS[:1]).notes:
            logger.warning("%s", note)


def _instead(holder: type, name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    before = upstream(holder, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(before, self, *args, **kwargs)

    method.__name__, method.__doc__ = name, before.__doc__
    setattr(method, _MARK, True)
    return method


def _get_accelerator_devices(before: Callable[..., Any], self: Any) -> list[Any]:
    """Right where all devices are visible and the list is not set, which Ray takes for a mistake."""
    if self.module_name != NAME:
        found: list[Any] = before(self)
        return found
    ids = ray.get_runtime_context().get_accelerator_ids().get(NPU.key, [])
    indices = assigned_devices([str(each) for each in ids], os.environ)
    return [accelerator(NAME).device(index) for index in indices or [0]]


def _get_device_context(before: Callable[..., Any], self: Any, device: Any) -> AbstractContextManager[Any]:
    """For good, not for a block: between reading and writing, the same thread runs the actor's method."""
    if self.module_name != NAME or device.type != NAME:
        scope: AbstractContextManager[Any] = before(self, device)
        return scope
    _bind(device)
    return nullcontext()


def _current_stream(before: Callable[..., Any], self: Any) -> Any:
    """Of the assigned device: a thread that has none set would open device 0."""
    if self.module_name == NAME:
        _bind(own_device())
    return before(self)


def _serialize_to_numpy_or_scalar(before: Callable[..., Any], self: Any, tensor: Any) -> Any:
    if tensor.device.type == NAME:
        _copies.count(tensor)
    return before(self, tensor)


def _write(before: Callable[..., Any], self: Any, value: Any, timeout: float | None = None) -> None:
    """After the reader has the tensors of the message before, and so has read what came ahead of them.

    Between nodes, Ray's channels have room for one message, and while that is not read, the node's raylet waits and
    takes no other (ray-project/ray#49044). A writer that hurries ahead would stop the very message, on another channel,
    for which the reader waits. Within a node channels are shared memory, which nobody stands before.
    """
    own_node = ray.get_runtime_context().get_node_id()
    if all(node == own_node for _, node in self._reader_and_node_list):
        _send(before, self, value, timeout)
        return
    if (catch_up := getattr(self, _CATCH_UP, None)) is not None:
        catch_up()
    _send(before, self, value, timeout)
    if (when_sent := getattr(self._gpu_data_channel._accelerator_group, "when_sent", None)) is not None:
        setattr(self, _CATCH_UP, when_sent())


def _send(before: Callable[..., Any], self: Any, value: Any, timeout: float | None) -> None:
    """With _direct_return Ray asks a tensor whether it ``is_cuda``; one of an NPU is sent just the same."""
    if self._cpu_data_channel is not None or getattr(getattr(value, "device", None), "type", None) != NAME:
        before(self, value, timeout)
        return
    self.ensure_registered_as_writer()
    if self._local_channel is not None:
        self._local_channel.write(value)
    self._gpu_data_channel.write([value], timeout=timeout)


class _OfThread:
    """An attribute with a value for each thread, lest two graphs of one actor mix their messages."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self._new, self._values = new, threading.local()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if not hasattr(self._values, "value"):
            self._values.value = self._new()
        return self._values.value

    def __set__(self, instance: Any, value: Any) -> None:
        self._values.value = value


class _Bound(threading.local):
    device: Any = None


_bound = _Bound()


def _bind(device: Any) -> None:
    npu = accelerator(NAME)
    if _bound.device != device or npu.current_device() != device.index:
        npu.bind_thread(device)
        _bound.device = device


def _of_another_device(tensor: Any) -> str:
    own = ChannelContext.get_current()._torch_device
    if own is None or own == tensor.device:
        return ""
    return f" (this actor's device for transfers is {own}: make the tensor there)"
