"""Both classes of accelerators against the real API of torch, without a device; captures; which platform is which."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.accelerators import base
from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.captures import Captures, watch
from vllm_ray_ascend.accelerators.choose import NAMES, accelerator, name_of, unsupported
from vllm_ray_ascend.accelerators.cuda import Cuda
from vllm_ray_ascend.accelerators.npu import Npu
from vllm_ray_ascend.devices.kind import GPU, NPU
from vllm_ray_ascend.errors import CaptureError

pytestmark = pytest.mark.unit


def calls_of_the_base() -> list[tuple[str, int, list[str]]]:
    """What base.py calls of torch's module: name, number of arguments, names of keyword arguments."""
    found = []
    for node in ast.walk(ast.parse(Path(base.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func
            if isinstance(called.value, ast.Attribute) and called.value.attr == "torch_module":
                found.append((called.attr, len(node.args), [str(each.arg) for each in node.keywords]))
    return found


def test_the_base_uses_what_is_looked_at_here() -> None:
    assert {name for name, *_ in calls_of_the_base()} == {
        "device_count", "set_device", "current_device", "current_stream", "Stream", "stream", "set_stream", "Event",
        "synchronize",
        "is_current_stream_capturing", "empty_cache", "mem_get_info", "memory_allocated", "memory_reserved",
    }  # fmt: skip


SURFACE = """
import inspect, json, sys
from vllm_ray_ascend.accelerators.choose import accelerator
found = accelerator(sys.argv[1])
for name, arguments, keywords in json.loads(sys.argv[2]):
    inspect.signature(getattr(found.torch_module, name)).bind(*[None] * arguments, **dict.fromkeys(keywords))
for name in ("capture_begin", "capture_end"):
    assert inspect.isfunction(getattr(found.graph_class, name)), name
assert found.device(3).type == found.name and found.device(3).index == 3
from torch import distributed
assert found.name == "npu" or distributed.Backend.backend_capability[found.communicator] == ["cuda"]
"""


def test_the_real_torch_cuda_takes_these_calls() -> None:
    """The CPU build of torch has all of torch.cuda's names. torch.npu's need CANN: see tests/softnpu."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", SURFACE, "cuda", json.dumps(calls_of_the_base())],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [Npu, Cuda])
def test_each_says_what_the_base_leaves_open(kind: type[Accelerator]) -> None:
    assert not inspect.isabstract(kind)
    assert kind.kind in (NPU, GPU) and kind.name in NAMES and kind.communicator in ("hccl", "nccl")


def test_one_object_a_process() -> None:
    assert [accelerator(name).kind for name in NAMES] == [NPU, GPU]
    assert accelerator("npu") is accelerator("npu")


class Platform(SimpleNamespace):
    def is_cuda(self) -> bool:
        return bool(self.cuda)


@pytest.mark.parametrize(
    ("device_type", "cuda", "name"),
    [("npu", False, "npu"), ("cuda", True, "cuda"), ("cuda", False, None), ("cpu", False, None)],
    ids=["NPU", "CUDA", "ROCm", "CPU"],
)
def test_the_platform_decides(device_type: str, cuda: bool, name: str | None) -> None:
    assert name_of(Platform(device_type=device_type, cuda=cuda)) == name


def test_any_other_platform_is_told_of_both() -> None:
    text = unsupported(Platform(device_type="cpu", cuda=False))
    assert text.startswith("vLLM's platform is Platform, and")
    assert "NPUPlatform" in text and "CudaPlatform" in text and "VLLM_RAY_ASCEND=1" in text


def test_kinds_in_words() -> None:
    assert (NPU.one, GPU.one) == ("an NPU", "a GPU")
    assert (NPU.counted(1), GPU.counted(2), NPU.counted(0.5)) == ("1 NPU", "2 GPUs", "0.5 NPUs")
    assert (NPU.ray_start(8), GPU.ray_start(8)) == ("""--resources='{"NPU": 8}'""", "--num-gpus=8")


class Graph:
    """The two methods that torch's graphs have."""

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


def test_captures_are_seen_from_begin_to_end(graphs: type[Graph]) -> None:
    captures = Captures()
    watch(graphs, captures, print)
    watch(graphs, captures, print)  # once is enough
    graph = graphs()
    assert graph.capture_begin(pool=7) == 7
    assert [captures.under_way] == [True]
    with pytest.raises(CaptureError, match="a receive would touch the device"):
        captures.kept_out("a receive").__enter__()
    assert graph.capture_end() == "ended"
    with captures.kept_out("a receive"):
        pass
    assert not captures.under_way


def test_a_capture_that_cannot_begin_is_none(graphs: type[Graph]) -> None:
    captures = Captures()
    watch(graphs, captures, print)
    graph = graphs()
    graph.begins = False
    with pytest.raises(RuntimeError, match="no stream"):
        graph.capture_begin()
    assert not captures.under_way
    captures.end()  # torch may call it all the same
    assert not captures.under_way


def test_a_capture_that_failed_leaves_its_pool_once(graphs: type[Graph]) -> None:
    left: list[int] = []
    captures = Captures()
    watch(graphs, captures, left.append)
    for pool, begins, ends in ((1, True, True), (2, False, False), (3, True, False), (None, True, False)):
        graph = graphs()
        graph.begins, graph.ends = begins, ends
        with contextlib.suppress(RuntimeError):
            graph.capture_begin(pool=pool)
        with contextlib.suppress(RuntimeError):  # torch ends a capture that never began as well
            graph.capture_end()
    assert left == [2, 3] and not captures.under_way


def test_a_capture_waits_for_other_threads_and_not_for_its_own() -> None:
    captures = Captures()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with captures.kept_out("a send"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    impatient = Captures(wait_s=0.0)
    impatient._work = captures._work
    with pytest.raises(CaptureError, match="another thread has used the device for a send"):
        impatient.begin()
    assert not impatient.under_way
    leave.set()
    captures.begin()
    thread.join()
    captures.end()
    with captures.kept_out("a copy"):
        captures.begin()
    captures.end()
