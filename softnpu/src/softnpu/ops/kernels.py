"""Install a kernel for every operator of the npu device, or one that raises with the operator's name."""

from __future__ import annotations

import os
import warnings

import torch

from softnpu.ops.library import load_extension

# Kernels that allocate, view or move storage, or read one number: torch_npu's own are right here.
_KEPT_ATEN = """
    empty empty_strided empty_like new_empty_strided as_strided view _reshape_alias squeeze unsqueeze unfold
    view_as_real view_as_complex contiguous set_ resize_ _resize_output_ _copy_from _copy_from_and_resize
    _local_scalar_dense is_pinned _pin_memory pin_memory record_stream is_set_to empty_quantized _to_copy to
    _has_compatible_shallow_copy_type isclose allclose _empty_affine_quantized
"""
KEPT_ATEN = frozenset(_KEPT_ATEN.split())
# Operators of torch_npu that only handle storage.
_KEPT_NPU = """
    get_npu_format npu_reshape npu_reshape.out npu_format_cast npu_format_cast_ copy_memory_ get_storage_size
    npu_change_data_ptr empty_with_format unsafe_empty_with_format npu_view_copy npu_lazy_
    _has_compatible_shallow_copy_type
"""
KEPT_NPU = frozenset(_KEPT_NPU.split())


def install_kernels() -> None:
    """Install the kernels. Called right after torch_npu was imported."""
    with warnings.catch_warnings():  # torch warns of each kernel that is replaced
        warnings.simplefilter("ignore")
        with _SilencedStderr():
            load_extension().install_aten(KEPT_ATEN)
            from softnpu.ops import dense, integers, moe  # registers their kernels

            load_extension().refuse("npu", KEPT_NPU | dense.NAMES | integers.NAMES | moe.NAMES)
    _define_torchvision_operators()


class _SilencedStderr:
    """Discards what C++ writes to standard error: torch warns there of each replaced kernel, a thousand lines."""

    def __enter__(self) -> None:
        self._saved = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *exception: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)


_torchvision: torch.library.Library | None = None


def _define_torchvision_operators() -> None:
    """Define two schemas that torchvision needs: its wheel is a CUDA build, whose operators do not load here."""
    global _torchvision
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        _torchvision.define(schema)
