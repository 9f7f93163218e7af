"""Pure functions of hccl and ray_transport: data types, limits, error texts, the NPU of an actor."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_ray_ascend.accelerators.npu_codes import HCCL
from vllm_ray_ascend.errors import DeviceMappingError, HcclError, TensorTransportError, TransferLateError
from vllm_ray_ascend.hccl.library import hccl_error
from vllm_ray_ascend.hccl.limits import connect_limit_s, op_wait_timeout_s, transfer_limit_s
from vllm_ray_ascend.hccl.types import (
    DATA_TYPES,
    MOVED_AS_BYTES,
    REDUCE_OPS,
    REDUCIBLE,
    reduction_data_type,
    transfer_data_type,
)
from vllm_ray_ascend.ray_transport.accelerator_context import assigned_devices

pytestmark = pytest.mark.unit

REPLACED = {
    "experimental/channel/accelerator_context.py": (
        "AcceleratorContext",
        {"get_accelerator_devices", "get_device_context", "current_stream", "accelerator_count", "module_name"},
    ),
    "experimental/channel/serialization_context.py": (
        "_SerializationContext",
        {"serialize_to_numpy_or_scalar", "_use_external_transport", "_out_of_band_tensors"},
    ),
    "experimental/channel/torch_tensor_accelerator_channel.py": (
        "TorchTensorAcceleratorChannel",
        {"write", "ensure_registered_as_writer", "_cpu_data_channel", "_gpu_data_channel", "_local_channel"},
    ),
    "experimental/channel/common.py": ("ChannelContext", {"torch_device", "set_torch_device", "_torch_device"}),
    "dag/dag_node.py": ("DAGNode", {"with_tensor_transport"}),
    "dag/compiled_dag_node.py": ("CompiledDAG", {"_get_gpu_ids"}),
}
"""What ray_transport replaces or reads in Ray's classes, by file: the same in Ray 2.48 and 2.60."""

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


def test_data_types_of_transfers() -> None:
    assert transfer_data_type("torch.bfloat16") == 11
    assert transfer_data_type("torch.int64") == 5
    assert transfer_data_type("torch.bool") == transfer_data_type("torch.float8_e4m3fn") == DATA_TYPES["uint8"]


@pytest.mark.parametrize("dtype", ["torch.complex64", "torch.qint8", "torch.bits8"])
def test_a_type_that_cannot_be_moved_is_named_with_a_remedy(dtype: str) -> None:
    with pytest.raises(TensorTransportError, match=rf"cannot move a tensor of {dtype}\. Move one of bfloat16, bool"):
        transfer_data_type(dtype)


def test_data_types_of_reductions() -> None:
    assert reduction_data_type("torch.float16", "sum") == DATA_TYPES["float16"]
    assert reduction_data_type("torch.float16", "product") == DATA_TYPES["float16"]
    for dtype, op in (("float64", "sum"), ("bool", "max"), ("uint8", "sum"), ("bfloat16", "product")):
        with pytest.raises(TensorTransportError, match=rf"no {op} of torch\.{dtype}\. Convert"):
            reduction_data_type(f"torch.{dtype}", op)
    with pytest.raises(TensorTransportError, match=r"no reduction 'avg'.*divide a sum"):
        reduction_data_type("torch.float32", "avg")


def test_data_types_are_those_of_cann() -> None:
    """Compared with the header that torch_npu contains."""
    spec = find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torch_npu is not installed")
    header = Path(spec.submodule_search_locations[0], "include/third_party/hccl/inc/hccl/hccl_types.h").read_text()
    theirs = {name.lower(): int(code) for name, code in re.findall(r"HCCL_DATA_TYPE_(\w+) = (\d+)", header)}
    short = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "bfp16": "bfloat16"}
    named = {short.get(name, name): code for name, code in theirs.items()}
    assert {name: named[name] for name in DATA_TYPES} == dict(DATA_TYPES)
    ops = {name.lower(): int(code) for name, code in re.findall(r"HCCL_REDUCE_(\w+) = (\d+)", header)}
    assert [ops[name[:4].rstrip("u")] for name in ("sum", "prod", "max", "min")] == list(REDUCE_OPS.values())
    assert not REDUCIBLE - DATA_TYPES.keys() and not MOVED_AS_BYTES & DATA_TYPES.keys()


@pytest.mark.parametrize("code", sorted(HCCL))
def test_every_hccl_code_has_its_name_meaning_and_remedy(code: int) -> None:
    error = hccl_error("HcclSend", code, "CANN's own text")
    assert isinstance(error, HcclError) and error.hccl_code == code
    meaning = HCCL[code]
    assert str(error) == (
        f"VRA-503: HcclSend failed (CANN's own text). {meaning.name} ({code}): {meaning.what}. {meaning.remedy}"
    )


def test_an_unknown_hccl_code() -> None:
    assert "HCCL error 77 (77): no meaning of this code is known here" in str(hccl_error("HcclRecv", 77))


def test_transfer_late_error_is_a_timeout() -> None:
    assert issubclass(TransferLateError, TimeoutError)


def test_the_limit_stays_below_hccls_timeout() -> None:
    assert transfer_limit_s(0, {}) == 120
    assert transfer_limit_s(0, {"HCCL_EXEC_TIMEOUT": "100"}) == 80
    assert transfer_limit_s(0, {"HCCL_EXEC_TIMEOUT": "never"}) == 120
    assert transfer_limit_s(0, {"HCCL_EXEC_TIMEOUT": "0"}) == 120  # no limit
    assert transfer_limit_s(300, {"HCCL_EXEC_TIMEOUT": "100"}) == 300
    assert transfer_limit_s(0, {"HCCL_EXEC_TIMEOUT": "0.5"}) == 0.4  # valid on Atlas A3


def test_limits_of_hccl_itself() -> None:
    assert connect_limit_s({}) == 140
    assert connect_limit_s({"HCCL_CONNECT_TIMEOUT": "600"}) == 620
    assert op_wait_timeout_s({}) == 1866
    assert op_wait_timeout_s({"HCCL_EXEC_TIMEOUT": "0.5"}) == 31
    assert op_wait_timeout_s({"HCCL_EXEC_TIMEOUT": "0"}) == 0


@pytest.mark.parametrize(
    ("ids", "visible", "found"),
    [
        (["5"], None, [5]),  # RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES, where Ray's own look-up raises
        (["5"], "5", [0]),  # Ray has narrowed the list to what it assigned
        (["5"], "4,5,6", [1]),  # the list of the node's `ray start`
        (["6", "4"], "4,5,6", [2, 0]),
        (["2"], "", [2]),
        ([], "4,5", []),
    ],
)
def test_the_npu_of_an_actor(ids: list[str], visible: str | None, found: list[int]) -> None:
    assert assigned_devices(ids, {} if visible is None else {VISIBLE: visible}) == found


def test_an_npu_that_the_actor_does_not_see() -> None:
    with pytest.raises(
        DeviceMappingError, match=r"Physical NPU 7 is not visible here: .*ASCEND_RT_VISIBLE_DEVICES=4,5,7"
    ):
        assigned_devices(["7"], {VISIBLE: "4,5"})
    with pytest.raises(DeviceMappingError, match="'ASCEND-1' is not the number of an NPU"):
        assigned_devices(["ASCEND-1"], {})


def member_names(path: Path, class_name: str) -> set[str]:
    """Members of a class, and attributes that its methods set or read."""
    tree = ast.parse(path.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name)
    functions = {node.name for node in ast.walk(found) if isinstance(node, ast.FunctionDef)}
    attributes = {node.attr for node in ast.walk(found) if isinstance(node, ast.Attribute)}
    return functions | attributes


@pytest.mark.parametrize("file", sorted(REPLACED))
def test_ray_has_what_is_replaced(file: str) -> None:
    spec = find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("Ray is not installed")
    class_name, names = REPLACED[file]
    assert not names - member_names(Path(spec.submodule_search_locations[0], file), class_name)
