"""Ray's part of a transfer by itself: a tensor transport and a communicator of graphs that transfer nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator

NAME = "EMPTY"


def register() -> str:
    """Register the transport with Ray; return its name."""
    register_tensor_transport(NAME, ["npu"], EmptyTransport, torch.Tensor)
    return NAME


class EmptyTransport(TensorTransportManager):  # type: ignore[misc]
    """One-sided as our direct transport is; a receiver has new tensors at once."""

    def tensor_transport_backend(self) -> str:
        """Return its name."""
        return NAME

    @staticmethod
    def is_one_sided() -> bool:
        """Return True."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Return True."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Return True."""
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[torch.Tensor]) -> TensorTransportMetadata:
        """Return shapes and dtypes."""
        return TensorTransportMetadata([(tensor.shape, tensor.dtype) for tensor in rdt_object], "npu")

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        """Return nothing."""
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Return new tensors."""
        return [torch.empty(shape, dtype=dtype, device="npu") for shape, dtype in tensor_transport_metadata.tensor_meta]

    def send_multiple_tensors(
        self,
        tensors: list[torch.Tensor],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Do nothing: Ray never calls it of a one-sided transport."""

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[torch.Tensor]
    ) -> None:
        """Do nothing."""

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Do nothing."""


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
