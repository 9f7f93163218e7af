"""Why a capture failed, from what torch_npu and vllm-ascend raise; and the ranks' verdict."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.graphs.groups import verdict
from vllm_ray_ascend.graphs.reasons import Reason, why

pytestmark = pytest.mark.unit

NO_STREAM = (
    "capture_begin:../NPUGraph.cpp:318 NPU function error: ..., error code is 207008\n[Error]: Stream resources are"
)
BROKEN = "capture_end:../NPUGraph.cpp:371 NPU function error: endCaptureErr, error code is 507903"


class OutOfMemoryError(RuntimeError):
    """As torch's, by its words."""


def raised(error: Exception, during: Exception | None = None) -> Exception:
    """``error`` as torch.npu.graph raises it: while ``during`` is under way."""
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
        (RuntimeError(BROKEN), TypeError("takes 2 positional arguments"), "fault"),
        (AssertionError(), None, "fault"),
    ],
)
def test_kinds(error: Exception, during: Exception | None, kind: str) -> None:
    assert why(raised(error, during)).kind == kind


def test_the_text_is_that_of_the_first_error_in_one_line() -> None:
    text = why(raised(RuntimeError(BROKEN), RuntimeError(NO_STREAM))).text
    assert text.startswith("the NPU has no stream left for another graph (207008) [RuntimeError: capture_begin")
    assert "\n" not in text and "507903" not in text


def test_a_long_text_is_cut() -> None:
    assert len(why(RuntimeError("x" * 5000)).text) < 400


def test_what_was_suppressed_is_no_reason() -> None:
    error = raised(RuntimeError(BROKEN), KeyError("not of the capture"))
    error.__suppress_context__ = True
    assert why(error).kind == "other"


def test_the_verdict_names_the_lowest_rank_and_prefers_a_fault() -> None:
    streams, fault, lost = Reason("streams", "no stream"), Reason("fault", "broken"), Reason("lost", "gone")
    assert verdict([streams, lost, lost]) == Reason("lost", "rank 1, and 2 more ranks: gone")
    assert verdict([lost, fault]) == Reason("fault", "rank 1, and 1 more rank: broken")
    assert verdict([None, streams]) == Reason("streams", "rank 1: no stream")
    assert verdict([streams, streams]) == Reason("streams", "rank 0, and 1 more rank: no stream")
    assert verdict([streams, None, fault, streams]) == Reason("fault", "rank 2, and 2 more ranks: broken")
