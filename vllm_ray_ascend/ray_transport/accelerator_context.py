"""Ray's accelerator context for NPUs: the right devices, threads bound to them, and host copies that are counted.

Ray creates the contexts of actors itself, of its own class and with our communicator's class, so a subclass of ours
would not get there. What NPUs need is therefore put into Ray's classes, for contexts named "npu" only, in each process
that imports ray_transport.communicator; Ray pickles the communicator's class by name, so each actor of a graph imports
that module first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ray
from ray.experimental.channel import ChannelContext
from ray.experimental.channel.accelerator_context import AcceleratorContext

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import physical_to_visible
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, split_entries
from vllm_ray_ascend.environment.driver import NETWORK_SETTINGS
from vllm_ray_ascend.environment.node import apply_network_settings
from vllm_ray_ascend.environment.ports import npu_port_variables
from vllm_ray_ascend.errors import DeviceMappingError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

NAME = "npu"
"""torch's name of the device, and so Ray's of the context."""

_CONTEXT = "ray.experimental.channel.accelerator_context.AcceleratorContext"
_SERIALIZATION = "ray.experimental.channel.serialization_context._SerializationContext"
_CHANNEL = "ray.experimental.channel.torch_tensor_accelerator_channel.TorchTensorAcceleratorChannel"
_WAIT_FOR_PREVIOUS = "_vllm_ray_ascend_wait_for_previous"
_MESSAGE_STATE = {
    "_use_external_transport": bool,
    "_out_of_band_tensors": list,
    "_deserialized_tensor_placeholders": set,
}
"""Attributes of Ray's one serialization context of a process that hold the state of the present message."""


class HostCopies(NamedTuple):
    """NPU tensors of this process that Ray has copied through host memory."""

    tensors: int
    bytes: int


class _HostCopyCounter:
    """Counts host copies, and warns of the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = HostCopies(0, 0)

    def count_tensor(self, tensor: Any) -> None:
        with self._lock:
            is_first = not self.total.tensors
            size = tensor.numel() * tensor.element_size()
            self.total = HostCopies(self.total.tensors + 1, self.total.bytes + size)
        if is_first:
            logger.warning(
                "VRA-518: Ray takes an NPU tensor (%s%s on %s) through host memory. Where it goes to another actor, "
                "call vllm_ray_ascend.ray_transport.register() in the driver and annotate its node with "
                'with_tensor_transport("hccl")%s. Further ones are counted, not logged: '
                "vllm_ray_ascend.ray_transport.accelerator_context.host_copies().",
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                tensor.device,
                _other_device_hint(tensor),
            )


_counter = _HostCopyCounter()


def host_copies() -> HostCopies:
    """Return how many NPU tensors Ray has copied through host memory in this process: none but in the driver."""
    return _counter.total


class NpuContext(AcceleratorContext):  # type: ignore[misc]
    """The driver's context. A driver needs no NPU: torch's module is loaded when it is used."""

    def __init__(self, communicator_cls: type) -> None:
        self._torch_module_name = NAME
        self._communicator_cls = communicator_cls

    @property
    def _torch_mod(self) -> Any:
        return get_accelerator(NAME).torch_module


def install() -> None:
    """Put into Ray's classes what NPUs need there: once in a process, however often it is called."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # a driver without an NPU
        _ = get_accelerator(NAME).torch_module
    for target, replacement in (
        (f"{_CONTEXT}.get_accelerator_devices", _get_accelerator_devices),
        (f"{_CONTEXT}.get_device_context", _get_device_context),
        (f"{_CONTEXT}.current_stream", _current_stream),
        (f"{_SERIALIZATION}.serialize_to_numpy_or_scalar", _serialize_to_numpy_or_scalar),
        (f"{_CHANNEL}.write", _write),
    ):
        patches.wrap(target, functools.partial(_wrap_method, replacement))
    for name, default in _MESSAGE_STATE.items():
        if not patches.is_applied(f"{_SERIALIZATION}.{name}"):
            patches.apply(f"{_SERIALIZATION}.{name}", _ThreadLocalAttribute(default))


def get_actor_device() -> Any:
    """Return torch's device of this actor, with its index: that of Ray's channel context, else the assigned one.

    Ray keeps its first answer, which is "cpu" for an actor that was in a graph before there was a context for NPUs.
    """
    context = ChannelContext.get_current()
    device = context._torch_device
    if device is None or device.type != NAME:
        device = AcceleratorContext.get().get_accelerator_devices()[0]
    elif device.index is None:
        device = get_accelerator(NAME).torch_device(get_accelerator(NAME).current_device())
    context.set_torch_device(device)
    return device


def prepare_network() -> None:
    """Have HCCL listen on Ray's address of this node, as for vLLM's workers, unless the user has set its variables.

    Actors that share an NPU get ports of their own there.
    """
    share_npu_ports()
    if load().node_env == "derive":
        settings = apply_network_settings(str(ray.util.get_node_ip_address()), groups=NETWORK_SETTINGS[:1])
        for warning in settings.warnings:
            logger.warning("%s", warning)


def share_npu_ports() -> None:
    """Let an actor with a part of an NPU have another port of HCCL there than the NPU's other processes."""
    context = ray.get_runtime_context()
    if context.get_actor_id():  # a driver has no resources
        share = float(context.get_assigned_resources().get(NPU.key, 1.0))
        os.environ.update(npu_port_variables(share, os.environ))


def _wrap_method(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    return method


def _get_accelerator_devices(original: Callable[..., Any], self: Any) -> list[Any]:
    """Return the assigned NPUs, also where the list of visible ones is not set, which is an error to Ray."""
    if self.module_name != NAME:
        devices: list[Any] = original(self)
        return devices
    ids = ray.get_runtime_context().get_accelerator_ids().get(NPU.key, [])
    indices = assigned_devices([str(each) for each in ids], os.environ)
    return [get_accelerator(NAME).torch_device(index) for index in indices or [0]]


def _get_device_context(original: Callable[..., Any], self: Any, device: Any) -> AbstractContextManager[Any]:
    """Bind the thread permanently, not for a block: between a read and a write it runs the actor's method."""
    if self.module_name != NAME or device.type != NAME:
        scope: AbstractContextManager[Any] = original(self, device)
        return scope
    _bind_thread(device)
    return nullcontext()


def _current_stream(original: Callable[..., Any], self: Any) -> Any:
    """Return a stream of the assigned device: an unbound thread would open device 0."""
    if self.module_name == NAME:
        _bind_thread(get_actor_device())
    return original(self)


def _serialize_to_numpy_or_scalar(original: Callable[..., Any], self: Any, tensor: Any) -> Any:
    if tensor.device.type == NAME:
        _counter.count_tensor(tensor)
    return original(self, tensor)


def _write(original: Callable[..., Any], self: Any, value: Any, timeout: float | None = None) -> None:
    """Write once the reader has the tensors of the previous message, and has so read what preceded them.

    Between nodes, Ray's channels have room for one message, and while that is unread, the raylet of the reader's node
    waits and accepts no other (ray-project/ray#49044). A writer that runs ahead would block the very message, on
    another channel, for which the reader waits. Within a node channels are shared memory without a raylet.
    """
    own_node = ray.get_runtime_context().get_node_id()
    if all(node == own_node for _, node in self._reader_and_node_list):
        _write_value(original, self, value, timeout)
        return
    if (wait_for_previous := getattr(self, _WAIT_FOR_PREVIOUS, None)) is not None:
        wait_for_previous()
    _write_value(original, self, value, timeout)
    if (when_sent := getattr(self._gpu_data_channel._accelerator_group, "when_sent", None)) is not None:
        setattr(self, _WAIT_FOR_PREVIOUS, when_sent())


def _write_value(original: Callable[..., Any], self: Any, value: Any, timeout: float | None) -> None:
    """Write also a bare NPU tensor: with _direct_return Ray sends only tensors that are ``is_cuda``."""
    if self._cpu_data_channel is not None or getattr(getattr(value, "device", None), "type", None) != NAME:
        original(self, value, timeout)
        return
    self.ensure_registered_as_writer()
    if self._local_channel is not None:
        self._local_channel.write(value)
    self._gpu_data_channel.write([value], timeout=timeout)


class _ThreadLocalAttribute:
    """An attribute with a value for each thread, so that two graphs of one actor do not mix their messages."""

    def __init__(self, default: Callable[[], Any]) -> None:
        self._default, self._values = default, threading.local()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if not hasattr(self._values, "value"):
            self._values.value = self._default()
        return self._values.value

    def __set__(self, instance: Any, value: Any) -> None:
        self._values.value = value


class _BoundThread(threading.local):
    device: Any = None


_bound = _BoundThread()


def _bind_thread(device: Any) -> None:
    npu = get_accelerator(NAME)
    if _bound.device != device or npu.current_device() != device.index:
        npu.bind_thread(device)
        _bound.device = device


def _other_device_hint(tensor: Any) -> str:
    own = ChannelContext.get_current()._torch_device
    if own is None or own == tensor.device:
        return ""
    return f" (this actor's device for transfers is {own}: make the tensor there)"


def assigned_devices(ids: Sequence[str], environ: Mapping[str, str]) -> list[int]:
    """Return the visible indices, as in ``npu:N``, of the NPUs with Ray's ``ids``.

    Ray's ids are the numbers in the list of visible NPUs. Where there is no list, a process sees all NPUs, in their
    order: so it is with RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES, where Ray's own look-up fails.

    Raises DeviceMappingError where an id is not a number, or not in the list.
    """
    visible = split_entries(environ.get(VISIBLE_DEVICES))
    physical_ids = [_parse_npu_number(each) for each in ids]
    if visible is None:
        return physical_ids
    usable_ids = [_parse_npu_number(each) for each in visible]
    return [physical_to_visible(usable_ids, physical_id) for physical_id in physical_ids]


def _parse_npu_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DeviceMappingError(
            "VRA-519",
            f"{text!r} is not the number of an NPU. `ray stop` on this node, name NPUs by their numbers in "
            f"{VISIBLE_DEVICES} or unset it, and `ray start` again.",
        ) from None
