"""torch's dtypes as HCCL's data types, which are all moved but only partly reduced; and checks of arguments. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from vllm_ray_ascend.errors import TensorTransportError
from vllm_ray_ascend.hccl.library import ROOT_INFO_BYTES

if TYPE_CHECKING:
    import torch

DATA_TYPES: Mapping[str, int] = {
    "int8": 0,
    "int16": 1,
    "int32": 2,
    "float16": 3,
    "float32": 4,
    "int64": 5,
    "uint64": 6,
    "uint8": 7,
    "uint16": 8,
    "uint32": 9,
    "float64": 10,
    "bfloat16": 11,
}
"""HcclDataType in hccl/hccl_types.h, by torch's name of the dtype."""

MOVED_AS_BYTES = frozenset(
    {"bool", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}
)
"""dtypes that are moved as uint8: not every HCCL has them, and a transfer does not depend on their meaning."""

REDUCIBLE = frozenset({"int8", "int16", "int32", "int64", "float16", "float32", "bfloat16"})
"""dtypes that HCCL reduces, in CANN's page of HcclAllReduce; int16 and bfloat16 not by product."""

REDUCE_OPS: Mapping[str, int] = {"sum": 0, "product": 1, "max": 2, "min": 3}
"""HcclReduceOp."""


def transfer_data_type(dtype: str) -> int:
    """Return the HcclDataType that moves a dtype, given by its name such as ``torch.bfloat16``.

    Raises TensorTransportError for a dtype that cannot be moved.
    """
    name = dtype.removeprefix("torch.")
    if name in DATA_TYPES:
        return DATA_TYPES[name]
    if name in MOVED_AS_BYTES:
        return DATA_TYPES["uint8"]
    raise TensorTransportError(
        "VRA-505",
        f"HCCL cannot move a tensor of torch.{name}. Move one of {_join_sorted(DATA_TYPES.keys() | MOVED_AS_BYTES)}: "
        "for a complex tensor torch.view_as_real(tensor), for a quantised one tensor.int_repr() and its scale.",
    )


def reduction_data_type(dtype: str, op: str) -> int:
    """Return the HcclDataType of a dtype that is reduced by ``op``: sum, product, max or min.

    Raises TensorTransportError for a dtype or an ``op`` that HCCL does not reduce.
    """
    name = dtype.removeprefix("torch.")
    if op not in REDUCE_OPS:
        raise TensorTransportError(
            "VRA-506",
            f"HCCL has no reduction {op!r}. It has {_join_sorted(REDUCE_OPS)}; for an average, divide a sum by the "
            "number of ranks.",
        )
    if name not in REDUCIBLE or (op == "product" and name in ("int16", "bfloat16")):
        raise TensorTransportError(
            "VRA-507",
            f"HCCL has no {op} of torch.{name}. Convert the tensor first, such as tensor.float(): it has "
            f"{_join_sorted(REDUCIBLE)}, but no product of int16 and bfloat16.",
        )
    return DATA_TYPES[name]


def _join_sorted(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


class Member(Protocol):
    """One rank of a communicator."""

    device: int
    rank: int
    size: int

    @property
    def name(self) -> str:
        """Name of this rank in messages."""


def check_rank(rank: int, size: int, root_info: bytes) -> None:
    """Raise TensorTransportError for a rank outside the communicator, or a root info of the wrong length."""
    if size < 1 or not 0 <= rank < size:
        raise TensorTransportError(
            "VRA-508", f"Invalid rank {rank} of {size} ranks: ranks count from 0 to {max(0, size - 1)}."
        )
    if len(root_info) < ROOT_INFO_BYTES:
        raise TensorTransportError(
            "VRA-509",
            f"The root info of a communicator has {ROOT_INFO_BYTES} bytes, not {len(root_info)}: pass what "
            "create_root_info() returned on rank 0.",
        )


def check_peer_tensor(
    member: Member, what: str, tensor: torch.Tensor, peer: int, *, target: bool = False, allow_self: bool = False
) -> None:
    """Raise TensorTransportError where ``tensor`` cannot go to, or as a ``target`` come from, rank ``peer``."""
    if not 0 <= peer < member.size or (peer == member.rank and not allow_self):
        others = [rank for rank in range(member.size) if rank != member.rank]
        raise TensorTransportError("VRA-510", f"{member.name}: {what}: its other ranks are {others}.")
    _check_tensor(member, what, tensor, target)


def check_collective(member: Member, what: str, source: torch.Tensor, target: torch.Tensor, up: int, down: int) -> None:
    """Raise TensorTransportError unless ``target`` has ``up`` / ``down`` times the elements of ``source``."""
    _check_tensor(member, what, source, False)
    _check_tensor(member, what, target, True)
    if source.dtype != target.dtype or source.numel() * up != target.numel() * down:
        raise TensorTransportError(
            "VRA-511",
            f"{member.name}: {what}: into {describe_tensor(target)}. The target has to be of the same type, and of "
            f"{source.numel() * up // down} elements.",
        )


def describe_tensor(tensor: torch.Tensor) -> str:
    """Return dtype and shape, such as ``float32[2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_tensor(member: Member, what: str, tensor: torch.Tensor, target: bool) -> None:
    if (tensor.device.type, tensor.device.index) != ("npu", member.device):
        raise TensorTransportError(
            "VRA-512",
            f"{member.name}: {what}: the tensor is on {tensor.device}. Move it: tensor.to('npu:{member.device}').",
        )
    if tensor.layout is not _strided_layout():
        raise TensorTransportError(
            "VRA-513", f"{member.name}: {what}: a sparse tensor. Send its parts, or tensor.to_dense()."
        )
    if target and not tensor.is_contiguous():
        raise TensorTransportError(
            "VRA-514",
            f"{member.name}: {what}: the target is not contiguous. Receive into a new tensor, and copy it there.",
        )


def _strided_layout() -> Any:
    import torch

    return torch.strided
