"""Ray's part of a transfer by itself: a tensor transport and a communicator of graphs that transfer nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.tensor_transport_manager import CommunicatorMetadata, TensorTransportMetadata

from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator
from vllm_ray_ascend.ray_transport.direct.manager import DirectMetadata, DirectTransport

NAME = "EMPTY"


def register() -> str:
    """Register the transport with Ray; return its name."""
    register_tensor_transport(NAME, ["npu"], EmptyTransport, torch.Tensor)
    return NAME


class EmptyTransport(DirectTransport):
    """Our direct transport to Ray, but nothing is kept or sent: a receiver has new tensors at once."""

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[torch.Tensor]) -> DirectMetadata:
        """Return shapes and dtypes."""
        return DirectMetadata([(tensor.shape, tensor.dtype) for tensor in rdt_object], "npu")

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Return new tensors."""
        return [torch.empty(shape, dtype=dtype, device="npu") for shape, dtype in tensor_transport_metadata.tensor_meta]


class EmptyCommunicator(HcclCommunicator):
    """Ours, which connects but transfers nothing."""

    def send(self, value: torch.Tensor, peer_rank: int) -> None:
        """Do nothing."""

    def when_sent(self) -> Callable[[], None] | None:
        """Return None."""
        return None

    def recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        peer_rank: int,
        allocator: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return a new tensor."""
        return allocator(shape, dtype) if allocator else torch.empty(shape, dtype=dtype, device=self._device)
