"""Ray's interface to the direct transport: one object a process, which Ray calls to keep, receive, free and abort."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

from vllm_ray_ascend.ray_transport.direct.local_endpoint import get_local_endpoint
from vllm_ray_ascend.ray_transport.direct.pair_communicator import Allocate
from vllm_ray_ascend.ray_transport.direct.receiver import Origin, Receiver
from vllm_ray_ascend.ray_transport.direct.sender import Sender

if TYPE_CHECKING:
    import ray
    import torch


@dataclass
class DirectMetadata(TensorTransportMetadata):  # type: ignore[misc]
    """What a receiver needs to know of an object: shapes and dtypes of its tensors, and where they are."""

    origin: Origin | None = None


class DirectTransport(TensorTransportManager):  # type: ignore[misc]
    """Tensors of NPUs by reference, over one HCCL communicator for each pair of processes and direction.

    To Ray it is one-sided: the receiver requests the object, and a thread of the sender sends it. So no order of
    transfers has to be kept between actors, `ray.put` and `ray.get` work, and a busy sender sends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None

    def tensor_transport_backend(self) -> str:
        """Return the name under which this class was registered."""
        from ray.experimental.rdt.util import transport_manager_info

        names = {info.transport_manager_class: str(name) for name, info in transport_manager_info.items()}
        return names[type(self)]

    @staticmethod
    def is_one_sided() -> bool:
        """Return True: the receiver starts each transfer."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Return True: Ray then does not kill the actors of a transfer that fails."""
        return True

    def actor_has_tensor_transport(self, actor: ray.actor.ActorHandle) -> bool:
        """Return True without asking the actor: Ray calls it before each call. A receiver without an NPU raises."""
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[torch.Tensor]) -> DirectMetadata:
        """Keep an object of this process. Raises DirectTransportError where its tensors are not all on one NPU."""
        metas = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        if not rdt_object:
            return DirectMetadata(metas)
        device = get_local_endpoint().common_device(rdt_object)
        sender = self._get_sender()
        sender.keep_object(obj_id, rdt_object, device.index)
        return DirectMetadata(metas, device.type, Origin(sender.address, device.index))

    def get_communicator_metadata(
        self, src_actor: ray.actor.ActorHandle, dst_actor: ray.actor.ActorHandle, backend: str | None = None
    ) -> CommunicatorMetadata:
        """Return empty metadata: the two processes connect by the object's metadata."""
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
        endpoint = get_local_endpoint()
        npu = endpoint.accelerator
        device = endpoint.common_device(target_buffers).index if target_buffers else endpoint.receive_device()
        with npu.torch_module.device(device):
            if target_buffers:
                allocate = _use_buffers(target_buffers)
            else:
                allocate = _allocate_from(tensor_transport_metadata, npu.torch_device(device))
            return self._get_receiver().receive_object(obj_id, tensor_transport_metadata.origin, device, allocate)

    def send_multiple_tensors(
        self,
        tensors: list[torch.Tensor],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Raise NotImplementedError: Ray never calls it of a one-sided transport."""
        raise NotImplementedError("a one-sided transport does not push")

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[torch.Tensor]
    ) -> None:
        """Drop an object whose last reference is gone."""
        if self._sender is not None:
            self._sender.drop_object(obj_id)

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """End a transfer to this process; both ends raise, and their processes stay usable."""
        self._get_receiver().abort(obj_id, "Ray aborted the transfer, as it failed or took too long")

    def release(self) -> None:
        """Destroy this process's communicators. Objects stay, and transfers create new ones."""
        if self._sender is not None:
            self._sender.release()
        if self._receiver is not None:
            self._receiver.release()

    def _get_sender(self) -> Sender:
        with self._lock:
            self._sender = self._sender or Sender(get_local_endpoint())
            return self._sender

    def _get_receiver(self) -> Receiver:
        with self._lock:
            self._receiver = self._receiver or Receiver(get_local_endpoint())
            return self._receiver


def _allocate_from(metadata: TensorTransportMetadata, device: torch.device) -> Allocate:
    """Return a function that allocates tensors by the metadata's shapes and dtypes."""
    import torch

    return lambda: [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in metadata.tensor_meta]


def _use_buffers(buffers: list[torch.Tensor]) -> Allocate:
    """Return a function that returns the user's own buffers, after what the calling thread's stream does with them."""
    npu = get_local_endpoint().accelerator
    event = npu.create_event()
    event.record()

    def wait_for_buffers() -> list[torch.Tensor]:
        npu.current_stream().wait_event(event)
        return buffers

    return wait_for_buffers
