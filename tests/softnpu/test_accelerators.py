"""The NPU's accelerator class on a software NPU: threads, streams, events, captures, memory, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.softnpu.device import gated
from tests.softnpu.processes import check_python
from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.choose import current_accelerator, get_accelerator
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.errors import CaptureError


@pytest.fixture
def npu() -> Iterator[Accelerator]:
    found = get_accelerator("npu")
    found.bind_thread(0)
    yield found
    found.bind_thread(0)


def run_in_thread(body: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(body()))
    thread.start()
    thread.join()
    return result[0]


def test_it_is_the_accelerator_of_vllms_platform(npu: Accelerator) -> None:
    assert current_accelerator() is npu
    assert (npu.kind, npu.name, npu.dist_backend) == (NPU, "npu", "hccl")
    assert npu.device_count() == 8 and npu.torch_device(3) == torch.device("npu:3")


def test_a_thread_uses_the_device_that_it_was_bound_to(npu: Accelerator) -> None:
    def body() -> tuple[int, int, int, str]:
        npu.bind_thread(npu.torch_device(5))
        made = torch.ones(2, device="npu").device
        return npu.get_opened_device(), npu.current_device(), npu.physical_device_id(npu.get_opened_device()), str(made)

    assert run_in_thread(body) == (5, 5, 5, "npu:5")
    assert npu.get_opened_device() == npu.current_device() == 0


def test_a_thread_that_opened_no_device_is_an_error(npu: Accelerator) -> None:
    def body() -> str:
        try:
            return str(npu.get_opened_device())
        except RuntimeError as error:
            return str(error)

    assert "VRA-410: CANN error 107002" in run_in_thread(body)


def test_streams_are_per_thread(npu: Accelerator) -> None:
    mine = npu.create_stream()

    def body() -> bool:
        npu.bind_thread(0)
        return bool(npu.current_stream() == mine)

    with npu.stream_context(mine):
        assert npu.current_stream() == mine
        assert run_in_thread(body) is False
    assert npu.current_stream() != mine


def test_events_order_streams(npu: Accelerator) -> None:
    producer, consumer = npu.create_stream(), npu.create_stream()
    x, seen, event = torch.zeros(4, device="npu"), torch.zeros(4, device="npu"), npu.create_event()
    npu.synchronize()
    with gated(producer) as gate:
        with npu.stream_context(producer):
            x.fill_(3.0)
            event.record()
        with npu.stream_context(consumer):
            event.wait()
            seen.copy_(x)
        assert not event.query()
        gate.open()
        npu.synchronize()
    assert event.query() and seen.tolist() == [3.0] * 4


def test_timed_events_measure(npu: Accelerator) -> None:
    begin, end = npu.create_event(timed=True), npu.create_event(timed=True)
    begin.record()
    torch.ones(1000, device="npu").sum()
    end.record()
    npu.synchronize()
    assert begin.elapsed_time(end) > 0


def test_device_work_is_refused_during_a_capture(npu: Accelerator) -> None:
    npu.watch_captures()
    npu.watch_captures()
    x, y = torch.ones(4, device="npu"), torch.ones(4, device="npu")
    seen: dict[str, Any] = {}

    def other_thread() -> None:
        npu.bind_thread(0)
        seen["other thread"] = npu.is_capturing()
        try:
            with npu.exclude_captures("a receive"):
                y.copy_(torch.zeros(4))  # would break the capture
        except CaptureError as error:
            seen["error"] = str(error)

    npu.synchronize()
    assert not npu.is_capturing()
    graph = npu.graph_class()
    with torch.npu.graph(graph):
        seen["own thread"] = npu.is_capturing()
        x.add_(1)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert not npu.is_capturing()
    graph.replay()
    npu.synchronize()
    assert x.tolist() == [2.0] * 4
    assert "a receive would touch the device while a graph is captured" in seen.pop("error")
    assert seen == {"own thread": True, "other thread": True}
    with npu.exclude_captures("a receive"):
        y.copy_(torch.zeros(4))
    assert y.tolist() == [0.0] * 4


def test_a_capture_waits_for_the_work_of_another_thread(npu: Accelerator) -> None:
    npu.watch_captures()
    x = torch.ones(4, device="npu")
    working, finish = threading.Event(), threading.Event()

    def work() -> None:
        npu.bind_thread(0)
        with npu.exclude_captures("a receive"):
            working.set()
            finish.wait(30)
            x.copy_(torch.zeros(4))  # while the capture waits: it does not break it

    def capture() -> None:
        npu.bind_thread(0)
        with torch.npu.graph(npu.graph_class()):
            assert finish.is_set()
            x.add_(1)

    npu.synchronize()
    worker = threading.Thread(target=work)
    worker.start()
    working.wait(30)
    capturer = threading.Thread(target=capture)
    capturer.start()
    while not npu.captures.in_progress:
        pass
    finish.set()
    capturer.join()
    worker.join()
    assert x.tolist() == [0.0] * 4 and not npu.is_capturing()


def test_a_failed_capture_is_no_longer_in_progress(npu: Accelerator) -> None:
    npu.watch_captures()
    x = torch.ones(4, device="npu")
    npu.synchronize()
    with pytest.raises(RuntimeError) as raised, torch.npu.graph(npu.graph_class()):
        x.cpu()
    assert not npu.is_capturing()
    explained = npu.explain_error(raised.value)
    assert explained is not None and explained.startswith("ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED (507903)")
    assert (x + 1).tolist() == [2.0] * 4


def test_memory(npu: Accelerator) -> None:
    npu.release_graphs(None)
    before = npu.get_memory_info()
    held = torch.empty(32 << 20, dtype=torch.uint8, device="npu")
    after = npu.get_memory_info()
    assert after.total == before.total >= after.free >= 0
    assert after.allocated - before.allocated >= held.numel()
    assert after.reserved - before.reserved >= held.numel()
    assert before.free - after.free >= held.numel()


def test_graphs_are_released_with_their_streams() -> None:
    """Capture graphs of vllm-ascend's wrapper until no stream is left: a release makes room for as many."""
    check_python(
        """
        import torch, torch_npu
        from types import SimpleNamespace
        from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
        from vllm.forward_context import BatchDescriptor, set_forward_context
        from vllm_ascend.ascend_config import init_ascend_config
        from vllm_ascend.compilation.acl_graph import ACLGraphWrapper
        from vllm_ray_ascend.accelerators.choose import get_accelerator

        npu, config = get_accelerator("npu"), VllmConfig()
        npu.bind_thread(0)
        npu.watch_captures()
        init_ascend_config(config)
        x, side, event = torch.ones(4, device="npu"), npu.create_stream(), npu.create_event()

        def model():  # a second stream: each graph costs one of the budget for as long as it lives
            event.record()
            event.wait(side)
            with npu.stream_context(side):
                x.add_(1)
            event.record(side)
            event.wait()
            return x

        with set_current_vllm_config(config):
            wrapper = ACLGraphWrapper(model, config, CUDAGraphMode.FULL)

        def fill():
            for size in range(1, 200):
                descriptor = BatchDescriptor(num_tokens=size)
                full = CUDAGraphMode.FULL
                with set_forward_context(None, config, cudagraph_runtime_mode=full, batch_descriptor=descriptor):
                    try:
                        wrapper()
                    except RuntimeError as error:
                        found = npu.explain_error(error)
                        assert found and "NO_STREAM_RESOURCE" in found, (found, error)
                        return size
            raise SystemExit("the budget never ended")

        first = fill()
        assert first > 3, first
        npu.release_graphs(SimpleNamespace())
        assert not wrapper.concrete_aclgraph_entries
        again = fill()
        assert again == first, (first, again)
        """,
        SOFTNPU_STREAMS="64",
    )


@pytest.mark.parametrize(
    ("setting", "value", "code", "explanation"),
    [
        ("SOFTNPU_MEMORY", "64M", "torch.empty(1 << 30, dtype=torch.uint8, device='npu')", "NPU out of memory: "),
        (
            "SOFTNPU_FAULTS",
            "open_device:device=0",
            "torch.ones(1, device='npu')",
            "ACL_ERROR_RT_DEV_SETUP_ERROR (507033)",
        ),
    ],
)
def test_real_errors_are_explained(setting: str, value: str, code: str, explanation: str) -> None:
    check_python(
        f"""
        import torch, torch_npu
        from vllm_ray_ascend.accelerators.choose import get_accelerator
        try:
            {code}
        except RuntimeError as error:
            found = get_accelerator("npu").explain_error(error)
            assert found and found.startswith({explanation!r}), (found, str(error))
        else:
            raise SystemExit("nothing was raised")
        """,
        **{setting: value},
    )


def test_a_missing_rank_is_explained() -> None:
    """HCCL through torch: rank 1 never connects."""
    check_python(
        """
        import os, torch, torch_npu, torch.distributed as dist
        from vllm_ray_ascend.accelerators.choose import get_accelerator
        npu = get_accelerator("npu")
        npu.bind_thread(0)
        store = dist.HashStore()
        dist.init_process_group(npu.dist_backend, store=store, rank=0, world_size=2)
        try:
            dist.all_reduce(torch.ones(4, device="npu"))
            npu.synchronize()
        except RuntimeError as error:
            found = npu.explain_error(error)
            print(found, flush=True)
            assert found and "HCCL_E_TIMEOUT (9)" in found, (found, str(error))
        else:
            raise SystemExit("nothing was raised")
        os._exit(0)
        """,
        SOFTNPU_CONNECT_TIMEOUT="3",
        TORCH_HCCL_ASYNC_ERROR_HANDLING="0",
    )
