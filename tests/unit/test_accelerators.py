"""Both accelerator classes against the real API of torch, without a device; capture tracking; choice by platform."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.accelerators import base
from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.captures import CaptureTracker, _Work, track_captures
from vllm_ray_ascend.accelerators.choose import NAMES, accelerator_name, get_accelerator, unsupported_platform_message
from vllm_ray_ascend.accelerators.cuda import CudaAccelerator
from vllm_ray_ascend.accelerators.npu import NpuAccelerator, find_pool_functions
from vllm_ray_ascend.devices.kind import GPU, NPU
from vllm_ray_ascend.errors import CaptureError

pytestmark = pytest.mark.unit


def base_calls() -> list[tuple[str, int, list[str]]]:
    """Return what base.py calls of torch's module: name, number of arguments, names of keyword arguments."""
    found = []
    for node in ast.walk(ast.parse(Path(base.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func
            if isinstance(called.value, ast.Attribute) and called.value.attr == "torch_module":
                found.append((called.attr, len(node.args), [str(each.arg) for each in node.keywords]))
    return found


def test_the_base_calls_only_what_is_checked_here() -> None:
    assert {name for name, *_ in base_calls()} == {
        "device_count", "set_device", "current_device", "current_stream", "Stream", "stream", "set_stream", "Event",
        "synchronize",
        "is_current_stream_capturing", "empty_cache", "mem_get_info", "memory_allocated", "memory_reserved",
    }  # fmt: skip


SURFACE = """
import inspect, json, sys
from vllm_ray_ascend.accelerators.choose import get_accelerator
found = get_accelerator(sys.argv[1])
for name, arguments, keywords in json.loads(sys.argv[2]):
    inspect.signature(getattr(found.torch_module, name)).bind(*[None] * arguments, **dict.fromkeys(keywords))
for name in ("capture_begin", "capture_end"):
    assert inspect.isfunction(getattr(found.graph_class, name)), name
assert found.torch_device(3).type == found.name and found.torch_device(3).index == 3
from torch import distributed
assert found.name == "npu" or distributed.Backend.backend_capability[found.dist_backend] == ["cuda"]
"""


def test_the_real_torch_cuda_accepts_these_calls() -> None:
    """The CPU build of torch has all of torch.cuda's names. torch.npu's need CANN: see tests/softnpu."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", SURFACE, "cuda", json.dumps(base_calls())],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [NpuAccelerator, CudaAccelerator])
def test_each_class_implements_the_base(kind: type[Accelerator]) -> None:
    assert not inspect.isabstract(kind)
    assert kind.kind in (NPU, GPU) and kind.name in NAMES and kind.dist_backend in ("hccl", "nccl")


def test_one_object_for_each_process() -> None:
    assert [get_accelerator(name).kind for name in NAMES] == [NPU, GPU]
    assert get_accelerator("npu") is get_accelerator("npu")


class Platform(SimpleNamespace):
    def is_cuda(self) -> bool:
        return bool(self.cuda)


@pytest.mark.parametrize(
    ("device_type", "cuda", "name"),
    [("npu", False, "npu"), ("cuda", True, "cuda"), ("cuda", False, None), ("cpu", False, None)],
    ids=["NPU", "CUDA", "ROCm", "CPU"],
)
def test_the_platform_decides(device_type: str, cuda: bool, name: str | None) -> None:
    assert accelerator_name(Platform(device_type=device_type, cuda=cuda)) == name


def test_an_unsupported_platform_error_names_both_supported_ones() -> None:
    text = unsupported_platform_message(Platform(device_type="cpu", cuda=False))
    assert text.startswith("vLLM's platform is Platform, and")
    assert "NPUPlatform" in text and "CudaPlatform" in text and "VLLM_RAY_ASCEND=1" in text


def test_kinds_are_named_in_messages() -> None:
    assert (NPU.with_article, GPU.with_article) == ("an NPU", "a GPU")
    assert (NPU.format_count(1), GPU.format_count(2), NPU.format_count(0.5)) == ("1 NPU", "2 GPUs", "0.5 NPUs")
    assert (NPU.ray_start_option(8), GPU.ray_start_option(8)) == ("""--resources='{"NPU": 8}'""", "--num-gpus=8")


class Graph:
    """The two methods of torch's graphs."""

    begins = True
    ends = True

    def capture_begin(self, pool: Any = None) -> Any:
        if not self.begins:
            raise RuntimeError("no stream")
        return pool

    def capture_end(self) -> str:
        if not self.ends:
            raise RuntimeError("broken")
        return "ended"


@pytest.fixture
def graphs() -> type[Graph]:
    class Fresh(Graph):
        capture_begin = Graph.capture_begin
        capture_end = Graph.capture_end

    return Fresh


def test_captures_are_tracked_from_begin_to_end(graphs: type[Graph]) -> None:
    captures = CaptureTracker()
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, object, print)
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, object, print)  # a further call does nothing
    graph = graphs()
    assert graph.capture_begin(pool=7) == 7
    assert [captures.in_progress] == [True]
    with pytest.raises(CaptureError, match="a receive would touch the device"):
        captures.exclude_captures("a receive").__enter__()
    assert graph.capture_end() == "ended"
    with captures.exclude_captures("a receive"):
        pass
    assert not captures.in_progress


def test_a_capture_that_cannot_begin_is_not_in_progress(graphs: type[Graph]) -> None:
    captures = CaptureTracker()
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, object, print)
    graph = graphs()
    graph.begins = False
    with pytest.raises(RuntimeError, match="no stream"):
        graph.capture_begin()
    assert not captures.in_progress
    captures.end_capture()  # torch may call it all the same
    assert not captures.in_progress


def test_a_failed_capture_releases_its_pool_once(graphs: type[Graph]) -> None:
    released: list[int] = []
    captures = CaptureTracker()
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, lambda: 4, released.append)
    for pool, begins, ends in ((1, True, True), (2, False, False), (3, True, False), (None, True, False)):
        graph = graphs()
        graph.begins, graph.ends = begins, ends
        with contextlib.suppress(RuntimeError):
            graph.capture_begin(pool=pool)
        with contextlib.suppress(RuntimeError):  # torch ends a capture that never began as well
            graph.capture_end()
    assert released == [2, 3, 4] and not captures.in_progress


def test_a_capture_that_has_ended_keeps_its_pool(graphs: type[Graph]) -> None:
    released: list[int] = []
    captures = CaptureTracker()
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, lambda: 4, released.append)
    graph = graphs()
    graph.capture_begin()
    graph.capture_end()
    graph.ends = False
    with pytest.raises(RuntimeError, match="broken"):  # torch refuses to end it a second time
        graph.capture_end()
    assert released == []


def test_a_capture_without_a_new_pool_is_not_in_progress(graphs: type[Graph]) -> None:
    def no_pool() -> int:
        raise RuntimeError("no device")

    released: list[int] = []
    captures = CaptureTracker()
    track_captures(graphs, "torch.cuda.graphs.CUDAGraph", captures, no_pool, released.append)
    graph = graphs()
    graph.capture_begin(pool=7)
    graph.capture_end()
    with pytest.raises(RuntimeError, match="no device"):
        graph.capture_begin()
    assert not captures.in_progress and released == []


def test_a_capture_waits_for_other_threads_and_not_for_its_own_thread() -> None:
    captures = CaptureTracker()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with captures.exclude_captures("a send"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    impatient = CaptureTracker(work_limit_s=0.0)
    impatient._work = captures._work
    with pytest.raises(CaptureError, match="another thread has used the device for a send"):
        impatient.begin_capture()
    assert not impatient.in_progress
    leave.set()
    captures.begin_capture()
    thread.join()
    captures.end_capture()
    with captures.exclude_captures("a copy"):
        captures.begin_capture()
    captures.end_capture()


def test_a_capture_names_the_time_for_which_it_has_waited() -> None:
    captures = CaptureTracker(work_limit_s=0.0)
    captures._work = [_Work(0, "connecting the ranks", time.monotonic() + 1)]
    with pytest.raises(CaptureError, match=r"for [1-9]\d* s another thread has used the device for connecting"):
        captures.begin_capture()


def bindings(*names: str) -> Any:
    """torch_npu._C with these functions, each of which returns its name."""
    return SimpleNamespace(**{name: (lambda *_, name=name: name) for name in names})


@pytest.mark.parametrize("end", ["_npu_endAllocateToPool", "_npu_endAllocateCurrentStreamToPool"])
def test_a_pools_allocation_is_ended_by_the_name_that_torch_npu_has(end: str) -> None:
    found = find_pool_functions(bindings("_npu_releasePool", end))
    assert [function(0, None) for function in found] == [end, "_npu_releasePool"]


def test_a_pool_function_that_is_gone_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        found = find_pool_functions(bindings("_npu_endAllocateToPool"))
    assert len(found) == 1
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["VRA-190"]
    assert "no longer has _npu_releasePool" in caplog.text
