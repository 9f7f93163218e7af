"""Cause of a failed capture, from the errors of torch_npu and vllm-ascend; and the cause that ranks agree on."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.acl_graphs.capture_errors import FailureCause, classify
from vllm_ray_ascend.acl_graphs.consensus import merge_causes

pytestmark = pytest.mark.unit

NO_STREAM = (
    "capture_begin:../NPUGraph.cpp:318 NPU function error: ..., error code is 207008\n[Error]: Stream resources are"
)
BROKEN = "capture_end:../NPUGraph.cpp:371 NPU function error: endCaptureErr, error code is 507903"


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's class of this name."""


def raised(error: Exception, during: Exception | None = None) -> Exception:
    """Return ``error`` as torch.npu.graph raises it: while ``during`` is handled."""
    error.__context__ = during
    return error


@pytest.mark.parametrize(
    ("error", "during", "kind"),
    [
        (RuntimeError(NO_STREAM), None, "streams"),
        (RuntimeError(BROKEN), RuntimeError(NO_STREAM), "streams"),
        (RuntimeError("Please upgrade. Original error: Alloc sq cq fail"), None, "streams"),
        (OutOfMemoryError("NPU out of memory. Tried to allocate 1.00 GiB"), None, "memory"),
        (RuntimeError(BROKEN), OutOfMemoryError("NPU out of memory."), "memory"),
        (RuntimeError(BROKEN), None, "other"),
        (RuntimeError(BROKEN), TypeError("takes 2 positional arguments"), "program_error"),
        (AssertionError(), None, "program_error"),
    ],
)
def test_errors_are_classified(error: Exception, during: Exception | None, kind: str) -> None:
    assert classify(raised(error, during)).kind == kind


def test_the_text_is_the_first_errors_in_one_line() -> None:
    text = classify(raised(RuntimeError(BROKEN), RuntimeError(NO_STREAM))).text
    assert text.startswith("the NPU has no stream left for another graph (207008) [RuntimeError: capture_begin")
    assert "\n" not in text and "507903" not in text


def test_a_long_text_is_shortened() -> None:
    assert len(classify(RuntimeError("x" * 5000)).text) < 400


def test_a_suppressed_error_is_not_the_cause() -> None:
    error = raised(RuntimeError(BROKEN), KeyError("not of the capture"))
    error.__suppress_context__ = True
    assert classify(error).kind == "other"


def test_the_merged_cause_names_the_lowest_rank_and_prefers_a_program_error() -> None:
    streams, program_error, unusable = (
        FailureCause("streams", "no stream"),
        FailureCause("program_error", "broken"),
        FailureCause("device_unusable", "gone"),
    )
    assert merge_causes([streams, unusable, unusable]) == FailureCause(
        "device_unusable", "rank 1, and 2 more ranks: gone"
    )
    assert merge_causes([unusable, program_error]) == FailureCause("program_error", "rank 1, and 1 more rank: broken")
    assert merge_causes([None, streams]) == FailureCause("streams", "rank 1: no stream")
    assert merge_causes([streams, streams]) == FailureCause("streams", "rank 0, and 1 more rank: no stream")
    assert merge_causes([streams, None, program_error, streams]) == FailureCause(
        "program_error", "rank 2, and 2 more ranks: broken"
    )
