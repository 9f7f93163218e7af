"""Whether a communicator can do what it is asked for: said before anything is handed to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm_ray_ascend.errors import TensorTransportError
from vllm_ray_ascend.transport.hccl.library import ROOT_INFO_BYTES

if TYPE_CHECKING:
    import torch


class Place(Protocol):
    """One rank of a communicator."""

    device: int
    rank: int
    size: int

    @property
    def name(self) -> str:
        """What messages call it."""


def place(rank: int, size: int, root: bytes) -> None:
    """Raise TensorTransportError for a rank that cannot be, or a root info that is none."""
    if size < 1 or not 0 <= rank < size:
        raise TensorTransportError(f"Rank {rank} of {size} ranks cannot be: ranks count from 0 to {max(0, size - 1)}.")
    if len(root) != ROOT_INFO_BYTES:
        raise TensorTransportError(
            f"The root info of a communicator has {ROOT_INFO_BYTES} bytes, not {len(root)}: it is what new_root() of "
            "rank 0 gave."
        )


def pair(at: Place, what: str, tensor: torch.Tensor, peer: int, *, target: bool = False, itself: bool = False) -> None:
    """Raise TensorTransportError where ``tensor`` cannot go to, or as a ``target`` come from, rank ``peer``."""
    if not 0 <= peer < at.size or (peer == at.rank and not itself):
        others = [rank for rank in range(at.size) if rank != at.rank]
        raise TensorTransportError(f"{at.name}: {what}: its other ranks are {others}.")
    _tensor(at, what, tensor, target)


def collective(at: Place, what: str, source: torch.Tensor, target: torch.Tensor, up: int, down: int) -> None:
    """Raise TensorTransportError unless ``target`` has ``up`` / ``down`` times the elements of ``source``."""
    _tensor(at, what, source, False)
    _tensor(at, what, target, True)
    if source.dtype != target.dtype or source.numel() * up != target.numel() * down:
        raise TensorTransportError(
            f"{at.name}: {what}: into {words(target)}. It has to be of the same type, and of "
            f"{source.numel() * up // down} elements."
        )


def words(tensor: torch.Tensor) -> str:
    """Type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _tensor(at: Place, what: str, tensor: torch.Tensor, target: bool) -> None:
    if (tensor.device.type, tensor.device.index) != ("npu", at.device):
        raise TensorTransportError(
            f"{at.name}: {what}: the tensor is on {tensor.device}. Move it: tensor.to('npu:{at.device}')."
        )
    if tensor.layout is not _strided():
        raise TensorTransportError(f"{at.name}: {what}: a sparse tensor. Send its parts, or tensor.to_dense().")
    if target and not tensor.is_contiguous():
        raise TensorTransportError(
            f"{at.name}: {what}: the target is not contiguous. Receive into a new tensor, and copy it there."
        )


def _strided() -> Any:
    import torch

    return torch.strided
