"""What Ray knows of the direct transport: one object a process, which Ray calls to keep, receive, free and abort."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.transport.direct.pair import Make
from vllm_ray_ascend.transport.direct.place import here
from vllm_ray_ascend.transport.direct.sink import Origin, Sink
from vllm_ray_ascend.transport.direct.source import Source

if TYPE_CHECKING:
    import ray
    import torch


@dataclass
class DirectMetadata(TensorTransportMetadata):  # type: ignore[misc]
    """What a receiver has to know of an object: shapes and types of its tensors, and where they are."""

    origin: Origin | None = None


class DirectTransport(TensorTransportManager):  # type: ignore[misc]
    """Tensors of NPUs by reference, over one HCCL communicator for each pair of processes and direction.

    To Ray it is one-sided: the receiver asks for the object, and a thread of the sender's sends it. So nobody has to
    keep an order of transfers between actors, `ray.put` and `ray.get` work, and a busy sender sends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._sink: Sink | None = None

    def tensor_transport_backend(self) -> str:
        """The name under which this class was registered."""
        from ray.experimental.rdt.util import transport_manager_info

        named = {info.transport_manager_class: str(name) for name, info in transport_manager_info.items()}
        return named[type(self)]

    @staticmethod
    def is_one_sided() -> bool:
        """Yes."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Yes: Ray does not kill the actors of a transfer that fails."""
        return True

    def actor_has_tensor_transport(self, actor: ray.actor.ActorHandle) -> bool:
        """Yes; Ray asks before each call, so the actor is not asked. One without an NPU says so when it receives."""
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[torch.Tensor]) -> DirectMetadata:
        """Keep an object of this process. Raises DirectTransportError where its tensors are not all on one NPU."""
        metas = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        if not rdt_object:
            return DirectMetadata(metas)
        device = _one_device(rdt_object)
        source = self._the_source()
        source.keep(obj_id, rdt_object, device.index)
        return DirectMetadata(metas, device.type, Origin(source.address, device.index))

    def get_communicator_metadata(
        self, src_actor: ray.actor.ActorHandle, dst_actor: ray.actor.ActorHandle, backend: str | None = None
    ) -> CommunicatorMetadata:
        """Nothing: the two processes find each other by the object's metadata."""
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Receive an object into new tensors on this process's NPU, or into ``target_buffers``.

        Raises DirectTransportError, and DeviceMappingError where this process has no NPU.
        """
        assert isinstance(tensor_transport_metadata, DirectMetadata)
        if tensor_transport_metadata.origin is None:
            return []
        npu = here().accelerator
        device = _one_device(target_buffers).index if target_buffers else here().device()
        with npu.torch_module.device(device):
            make = _given(target_buffers) if target_buffers else _new(tensor_transport_metadata, npu.device(device))
            return self._the_sink().receive(obj_id, tensor_transport_metadata.origin, device, make)

    def send_multiple_tensors(
        self,
        tensors: list[torch.Tensor],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Never called of a one-sided transport."""
        raise NotImplementedError("a one-sided transport does not push")

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[torch.Tensor]
    ) -> None:
        """Forget an object whose last reference is gone."""
        if self._source is not None:
            self._source.drop(obj_id)

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """End a transfer to this process; both ends raise, and go on to live."""
        self._the_sink().abort(obj_id, "Ray aborted the transfer, as it failed or took too long")

    def release(self) -> None:
        """Destroy this process's communicators. Objects stay, and transfers make new ones."""
        if self._source is not None:
            self._source.release()
        if self._sink is not None:
            self._sink.release()

    def _the_source(self) -> Source:
        with self._lock:
            self._source = self._source or Source(here())
            return self._source

    def _the_sink(self) -> Sink:
        with self._lock:
            self._sink = self._sink or Sink(here())
            return self._sink


def _one_device(tensors: list[torch.Tensor]) -> Any:
    """The device of all of them."""
    name = here().accelerator.name
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    if len(devices) == 1 and next(iter(devices)).type == name:
        return next(iter(devices))
    raise DirectTransportError(
        f"The tensors of one Ray object are on {', '.join(map(str, devices))}; this transport takes those of one NPU. "
        "Move them to it (`tensor.to('npu:N')`), return them as several objects, or without tensor_transport."
    )


def _new(metadata: TensorTransportMetadata, device: torch.device) -> Make:
    """Tensors as the metadata says."""
    import torch

    return lambda: [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in metadata.tensor_meta]


def _given(buffers: list[torch.Tensor]) -> Make:
    """The user's own, once what the calling thread's stream does with them is over."""
    npu = here().accelerator
    event = npu.new_event()
    event.record()

    def make() -> list[torch.Tensor]:
        npu.current_stream().wait_event(event)
        return buffers

    return make
