"""The CUDA class of accelerators on a GPU. Skipped where there is none; nothing here was run where this was written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.errors import CaptureError

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and torch's CUDA build"),
]


@pytest.fixture
def cuda() -> Iterator[Accelerator]:
    found = accelerator("cuda")
    found.bind_thread(0)
    yield found
    found.synchronise()


def test_devices(cuda: Accelerator) -> None:
    assert cuda.device_count() >= 1
    torch.ones(1, device=cuda.device(0))
    assert cuda.opened_device() == cuda.current_device() == 0


def test_streams_are_the_threads_own(cuda: Accelerator) -> None:
    mine, seen = cuda.new_stream(), []

    def body() -> None:
        cuda.bind_thread(0)
        seen.append(cuda.current_stream() == mine)

    with cuda.on_stream(mine):
        assert cuda.current_stream() == mine
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    assert seen == [False] and cuda.current_stream() != mine


def test_events_order_streams(cuda: Accelerator) -> None:
    producer, consumer = cuda.new_stream(), cuda.new_stream()
    x, seen, event = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda"), cuda.new_event()
    cuda.synchronise()
    with cuda.on_stream(producer):
        torch.cuda._sleep(10_000_000)
        x.fill_(3.0)
        event.record()
    with cuda.on_stream(consumer):
        event.wait()
        seen.copy_(x)
    cuda.synchronise()
    assert seen.tolist() == [3.0] * 4


def test_timed_events_measure(cuda: Accelerator) -> None:
    begin, end = cuda.new_event(timed=True), cuda.new_event(timed=True)
    begin.record()
    torch.ones(1000, device="cuda").sum()
    end.record()
    cuda.synchronise()
    assert begin.elapsed_time(end) > 0


def test_nothing_of_ours_meets_a_capture(cuda: Accelerator) -> None:
    cuda.watch_captures()
    x, y = torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
    seen: dict[str, Any] = {}

    def other_thread() -> None:
        cuda.bind_thread(0)
        seen["capturing"] = cuda.capturing()
        try:
            with cuda.guard("a receive"):
                y.cpu()
        except CaptureError as error:
            seen["error"] = str(error)

    cuda.synchronise()
    graph = cuda.graph_class()
    with torch.cuda.graph(graph):
        x.add_(1)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert not cuda.capturing()
    graph.replay()
    cuda.synchronise()
    assert x.tolist() == [2.0] * 4
    assert seen.pop("error").startswith("a receive would touch the device") and seen == {"capturing": True}


def test_a_forbidden_call_in_a_capture_is_explained(cuda: Accelerator) -> None:
    cuda.watch_captures()
    x = torch.ones(4, device="cuda")
    cuda.synchronise()
    with pytest.raises(RuntimeError) as raised, torch.cuda.graph(cuda.graph_class()):
        x.cpu()
    assert not cuda.capturing()
    assert cuda.explain(raised.value) is not None
    assert (x + 1).tolist() == [2.0] * 4


def test_memory(cuda: Accelerator) -> None:
    before = cuda.memory()
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    after = cuda.memory()
    assert after.total == before.total >= after.free
    assert after.allocated - before.allocated >= held.numel()


def test_out_of_memory_is_explained(cuda: Accelerator) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert "the GPU is out of memory" in str(cuda.explain(raised.value))
