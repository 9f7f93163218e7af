"""Explanations of the accelerators' error codes and texts. The texts are those of the real libraries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.accelerators import cuda_errors, npu_errors
from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.accelerators.npu_codes import HCCL, NUMBERED, RUNTIME, Meaning

pytestmark = pytest.mark.unit

CREATE = "createHCCLComm:build/compiler_depend.ts:1479 HCCL function error: {}, error code is {}"
NPU_TEXTS = {
    CREATE.format("hcclCommInitRootInfoConfig(numRanks, rootInfo)", 7): "HCCL_E_UNAVAIL (7)",
    CREATE.format("HcclGetRootInfo(&hcclID)", 11) + "\n[ERROR] ...\nEJ0003: Failed to bind the IP port.": "EJ0003",
    CREATE.format("HcclGetRootInfo(&hcclID)", 11): "HCCL_E_TCP_CONNECT (11)",
    CREATE.format("hcclCommInitRootInfoConfig(...)", 1): "HCCL_E_PARA (1)",
    "[Create][Sockets]Wait links establish completed failed, call trace: hcclRet -> 9": "HCCL_E_TIMEOUT (9)",
    "Communication_Error_Get_Socket(EI0006): Getting socket times out.": "EI0006",
    "HCCL error: HCCL_E_REMOTE": "HCCL_E_REMOTE",
    "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)": "NPU out of memory",
    "NPU function error: aclrtMalloc, error code is 207001": "ACL_ERROR_RT_MEMORY_ALLOCATION (207001)",
    "rtMemcpy ErrCode=107030 current capture mode": "ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT (107030)",
    "NPU function error: aclmdlRICaptureBegin, error code is 207008": "ACL_ERROR_RT_NO_STREAM_RESOURCE (207008)",
    "Stream resources are insufficient.": "ACL_ERROR_RT_NO_STREAM_RESOURCE",
    "drv: Alloc sq cq fail, error code is 207005": "Alloc sq cq fail",
    "The Inner error is reported, error code is 507014": "ACL_ERROR_RT_AICORE_TIMEOUT (507014)",
    "operator(): NPU function error: NPU error, error code is 507011": "ACL_ERROR_RT_MODEL_EXECUTE (507011)",
    "aclrtSetDevice, error code is 507033": "ACL_ERROR_RT_DEV_SETUP_ERROR (507033)",
}  # fmt: skip


@pytest.mark.parametrize(("text", "name"), NPU_TEXTS.items(), ids=NPU_TEXTS.values())
def test_errors_of_the_npu(text: str, name: str) -> None:
    found = npu_errors.explain_text(text)
    assert found is not None and found.startswith(f"{name}: ")


CUDA_TEXTS = {
    "CUDA out of memory. Tried to allocate 20.00 MiB.": "the GPU is out of memory",
    "CUDA error: operation not permitted when stream is capturing": "a call that no capture allows",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)": "inside NCCL",
    "NCCL error in: ProcessGroupNCCL.cpp:93, unhandled system error": "the network or shared memory",
    "NCCL error: remote process exited or there was a network error": "another rank is gone",
    "CUDA error: an illegal memory access was encountered": "a kernel failed",
    "CUDA error: invalid device ordinal": "no GPU with this number",
}


@pytest.mark.parametrize(("text", "meaning"), CUDA_TEXTS.items(), ids=CUDA_TEXTS.values())
def test_errors_of_cuda(text: str, meaning: str) -> None:
    found = cuda_errors.explain_text(text)
    assert found is not None and meaning in found


@pytest.mark.parametrize(
    "text", ["", "no", "error code is 207", "ValueError: 507014 tokens", "rank 207008 of 4", "code 0"]
)
def test_unknown_texts_are_not_explained(text: str) -> None:
    assert npu_errors.explain_text(text) is None and cuda_errors.explain_text(text) is None


@given(st.text())
def test_any_text_is_accepted(text: str) -> None:
    npu_errors.explain_text(text)
    cuda_errors.explain_text(text)


def test_causes_are_explained_too() -> None:
    try:
        try:
            raise RuntimeError("aclrtMalloc, error code is 207001")
        except RuntimeError as cause:
            raise ValueError("a block of the cache is missing") from cause
    except ValueError as error:
        found = get_accelerator("npu").explain_error(error)
    assert found is not None and "207001" in found
    circle = RuntimeError("nothing")
    circle.__context__ = circle
    assert get_accelerator("npu").explain_error(circle) is None


def test_required_codes_are_known() -> None:
    assert set(range(1, 25)) == set(HCCL)
    assert {207001, 207005, 207008, 107030, 507011, 507014, 507033} <= set(RUNTIME)
    assert {"EI0006", "EI0019", "EJ0003"} <= set(NUMBERED)
    assert "HCCL_E_UNAVAIL (7)" in npu_errors.explain_hccl_code(
        7
    ) and "HCCL error 99 (99)" in npu_errors.explain_hccl_code(99)


@pytest.mark.parametrize("meaning", [*HCCL.values(), *RUNTIME.values(), *NUMBERED.values()], ids=lambda m: m.name)
def test_every_meaning_has_a_remedy(meaning: Meaning) -> None:
    assert meaning.what and not meaning.what.endswith(".")
    assert len(meaning.remedy) > 20 and meaning.remedy.endswith(".")


def headers() -> Path:
    import importlib.util

    found = importlib.util.find_spec("torch_npu")
    if found is None or found.origin is None:
        pytest.skip("torch_npu is not installed, which has CANN's headers")
    return Path(found.origin).parent / "include"


def test_names_and_codes_are_those_of_cann() -> None:
    """Against the headers that torch_npu ships."""
    types = next(headers().rglob("hccl_types.h")).read_text()
    names = {int(code): name for name, code in re.findall(r"\b(HCCL_E_\w+) = (\d+)", types)}
    assert {code: meaning.name for code, meaning in HCCL.items()} == names
    errors = next(headers().rglob("rt_error_codes.h")).read_text()
    defined = {int(code): name for name, code in re.findall(r"#define\s+(ACL_ERROR_\w+)\s+(\d+)", errors)}
    assert {code: meaning.name for code, meaning in RUNTIME.items()}.items() <= defined.items()
