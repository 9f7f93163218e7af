"""torch's types of numbers as HCCL has them: to move them any type will do, to add them up only some. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_ray_ascend.errors import TensorTransportError

NUMBERS: Mapping[str, int] = {
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
"""HcclDataType in hccl/hccl_types.h."""

AS_BYTES = frozenset({"bool", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"})
"""Moved as bytes: not every HCCL has these types, and whoever only moves them need not know them."""

REDUCED = frozenset({"int8", "int16", "int32", "int64", "float16", "float32", "bfloat16"})
"""What HCCL adds up, in CANN's page of HcclAllReduce; no product of int16 and bfloat16."""

REDUCTIONS: Mapping[str, int] = {"sum": 0, "product": 1, "max": 2, "min": 3}
"""HcclReduceOp."""


def to_move(dtype: str) -> int:
    """HCCL's number for moving a type of torch (its name, such as ``torch.bfloat16``). Raises TensorTransportError."""
    name = dtype.removeprefix("torch.")
    if name in NUMBERS:
        return NUMBERS[name]
    if name in AS_BYTES:
        return NUMBERS["uint8"]
    raise TensorTransportError(
        f"HCCL cannot move a tensor of torch.{name}. Move one of {_listed(NUMBERS.keys() | AS_BYTES)}: for a complex "
        "tensor torch.view_as_real(tensor), for a quantised one tensor.int_repr() and its scale."
    )


def to_reduce(dtype: str, op: str) -> int:
    """HCCL's number for a type of torch that ``op`` (sum, product, max, min) reduces. Raises TensorTransportError."""
    name = dtype.removeprefix("torch.")
    if op not in REDUCTIONS:
        raise TensorTransportError(
            f"HCCL has no reduction {op!r}. It has {_listed(REDUCTIONS)}; for an average, divide a sum by the ranks."
        )
    if name not in REDUCED or (op == "product" and name in ("int16", "bfloat16")):
        raise TensorTransportError(
            f"HCCL has no {op} of torch.{name}. Convert the tensor first, such as tensor.float(): it has "
            f"{_listed(REDUCED)}, but no product of int16 and bfloat16."
        )
    return NUMBERS[name]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
