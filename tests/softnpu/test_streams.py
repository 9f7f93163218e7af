"""Streams are queues that run by themselves: what is missing a wait is wrong, what has one is right."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from tests.softnpu.device import gated
from tests.softnpu.processes import LIMIT, check_python, start_python
from tests.softnpu.runtime import NO_STREAM, OK, SYNC_TIMEOUT, RawStream, recent_error, runtime

OLD, NEW = 1.0, 2.0

# Each writes NEW into the target: a copy, operators with and without a result of their own, a fused operator.
WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "copy": lambda target: target.copy_(torch.full_like(target, NEW)),
    "fill": lambda target: target.fill_(NEW),
    "add": lambda target: target.add_(NEW - OLD),
    "out": lambda target: torch.mul(target, NEW / OLD, out=target),
    "cast": lambda target: target.copy_(torch.full_like(target, NEW, dtype=torch.bfloat16)),
    "index": lambda target: target.index_fill_(0, torch.arange(len(target), device="npu"), NEW),
    "fused": lambda target: target.copy_(
        torch.ops.npu.npu_rms_norm(target.view(1, -1), torch.full((len(target),), NEW / OLD, device="npu"), 0.0)[0][0]
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("waits", [False, True], ids=["without wait", "with wait"])
def test_another_stream_sees_the_work_only_if_it_waits(write: Callable[[torch.Tensor], object], waits: bool) -> None:
    producer, consumer = torch.npu.Stream(), torch.npu.Stream()
    target, seen = torch.full((8,), OLD, device="npu"), torch.zeros(8, device="npu")
    torch.npu.synchronize()
    with gated(producer) as gate:
        with torch.npu.stream(producer):
            write(target)
        if waits:
            consumer.wait_stream(producer)
        with torch.npu.stream(consumer):
            seen.copy_(target)
        if waits:
            assert not consumer.query()
            gate.open()
        consumer.synchronize()
        assert seen.tolist() == [NEW if waits else OLD] * 8
    producer.synchronize()
    assert target.tolist() == [NEW] * 8


def test_a_stream_runs_its_work_in_order_and_not_before() -> None:
    stream = torch.npu.Stream()
    x, rows = torch.zeros(4, device="npu"), torch.zeros(50, 4, device="npu")
    torch.npu.synchronize()
    with gated(stream) as gate:
        with torch.npu.stream(stream):
            for index in range(50):
                x.add_(1)
                rows[index].copy_(x)
        assert not stream.query()
        gate.open()
        stream.synchronize()
    assert stream.query()
    assert rows[:, 0].tolist() == list(range(1, 51))


def test_event_is_done_when_its_stream_got_there() -> None:
    stream, other = torch.npu.Stream(), torch.npu.Stream()
    event, late = torch.npu.Event(), torch.npu.Event()
    with gated(stream) as gate:
        event.record(stream)
        with torch.npu.stream(other):
            event.wait(other)
            late.record(other)
        assert not event.query()
        assert not late.query()
        gate.open()
        late.synchronize()
        assert event.query()


def test_recording_an_event_again_does_not_affect_its_waiters() -> None:
    first, second, waiter = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Stream()
    event = torch.npu.Event()
    with gated(first) as first_gate, gated(second):
        event.record(first)
        event.wait(waiter)
        event.record(second)
        first_gate.open()
        waiter.synchronize()  # would not end if it waited for the second recording
        assert not event.query()


def test_event_that_was_never_recorded_counts_as_done() -> None:
    stream, event = torch.npu.Stream(), torch.npu.Event()
    event.wait(stream)
    stream.synchronize()
    assert event.query()


def test_elapsed_time_is_no_less_than_what_lies_between() -> None:
    stream = torch.npu.Stream()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record(stream)
    start.synchronize()
    began = time.perf_counter()
    with gated(stream) as gate:
        end.record(stream)
        held_ms = (time.perf_counter() - began) * 1000
        gate.open()
        end.synchronize()
    assert start.elapsed_time(end) >= held_ms


def test_device_to_host_copy_without_synchronisation_is_stale() -> None:
    stream = torch.npu.Stream()
    source, target = torch.full((8,), NEW, device="npu"), torch.full((8,), OLD).pin_memory()
    torch.npu.synchronize()
    with gated(stream) as gate:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)
        assert target.tolist() == [OLD] * 8
        gate.open()
        stream.synchronize()
    assert target.tolist() == [NEW] * 8


def test_an_operator_that_fails_stops_the_device_and_says_why() -> None:
    check_python(
        """
        import os, torch, torch_npu
        bad, waiting, event = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Event()
        x = torch.zeros(4, device="npu")
        torch.npu.synchronize()

        def error_of(function):
            try:
                function()
            except RuntimeError as error:
                return str(error)
            raise SystemExit("no error")

        with torch.npu.stream(bad):
            x.index_select(0, torch.tensor([1000], device="npu"))  # its shape is known, its failure comes when it runs
        for call in (bad.synchronize, bad.synchronize, lambda: event.record(bad) or bad.synchronize(),
                     lambda: event.wait(waiting) or waiting.synchronize(), torch.npu.synchronize, lambda: x + 1):
            assert "index_select" in error_of(call) and "out of range" in error_of(call), error_of(call)
        os._exit(0)  # at exit torch_npu synchronises the device once more, and complains
        """
    )


def test_a_wait_without_end_has_the_limit_of_the_tests() -> None:
    check_python(
        """
        import os, torch, torch_npu
        stuck = torch.npu.Stream()
        torch.npu.ExternalEvent().wait(stuck)
        try:
            stuck.synchronize()
        except RuntimeError as error:
            assert "SOFTNPU_WAIT_LIMIT" in str(error), error
        else:
            raise SystemExit("the stream synchronises")
        os._exit(0)
        """,
        SOFTNPU_WAIT_LIMIT="0.2",
    )


def test_wrong_arguments_of_an_in_place_operator_raise_at_once() -> None:
    x = torch.zeros(4, device="npu")
    with pytest.raises(RuntimeError, match="size"):
        x.add_(torch.zeros(3, device="npu"))
    torch.npu.synchronize()  # the stream continues
    assert (x + 1).tolist() == [1.0] * 4


def test_synchronise_with_a_time_limit() -> None:
    torch.npu.set_device(0)
    stream = RawStream()
    stream.note(1)
    assert stream.synchronize(limit_ms=20) == SYNC_TIMEOUT
    assert "20 ms" in recent_error()
    assert stream.seen == []
    stream.open()
    assert stream.synchronize() == OK
    assert stream.seen == [1]
    assert runtime().aclrtDestroyStream(stream.handle) == OK


def test_destroying_a_stream_waits_for_its_work_unless_forced() -> None:
    torch.npu.set_device(0)
    forced = RawStream()
    for number in range(3):
        forced.note(number)
    assert runtime().aclrtDestroyStreamForce(forced.handle) == OK
    assert runtime().aclrtSynchronizeDeviceWithTimeout(5000) == OK  # without the forced one, whose task still waits
    patient = RawStream()
    for number in range(3):
        patient.note(number)
    forced.open()
    patient.open()
    assert runtime().aclrtDestroyStream(patient.handle) == OK
    assert patient.seen == [0, 1, 2]
    assert forced.seen == []
    assert runtime().aclrtSynchronizeStream(forced.handle) != OK
    assert "unknown stream" in recent_error()


def test_stream_budget_is_the_devices_and_destroying_gives_back() -> None:
    check_python(
        f"""
        import acl, ctypes, os
        from tests.softnpu.runtime import runtime, recent_error
        handle = ctypes.c_void_p()
        create = lambda: runtime().aclrtCreateStream(ctypes.byref(handle))
        assert acl.rt.set_device(0) == 0
        assert [create() for _ in range(3)] == [0, 0, 0]
        assert create() == {NO_STREAM}
        assert "all 3 of NPU 0 are in use (SOFTNPU_STREAMS)" in recent_error(), recent_error()
        assert runtime().aclrtDestroyStream(handle) == 0 and create() == 0
        assert acl.rt.set_device(1) == 0 and create() == 0  # a budget for each device
        """,
        SOFTNPU_STREAMS="3",
    )


BUSY = """
    import threading, torch, torch_npu
    x = torch.randn(256, 256).npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        z = (x @ x) * 2
    def work():
        torch.npu.set_device(0)
        for stream in [torch.npu.Stream() for _ in range(4)]:
            with torch.npu.stream(stream):
                for _ in range(20):
                    y = (x @ x).relu()
                graph.replay()
    work()
    threading.Thread(target=work).start()
"""


def test_process_with_busy_streams_and_graphs_exits_cleanly() -> None:
    codes = [BUSY, BUSY + "    torch.npu.synchronize()\n"]
    started = [start_python(code, PYTHONFAULTHANDLER="1") for code in codes]
    assert [process.wait(LIMIT) for process in started] == [0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the timer slack of another thread")
def test_torch_npus_release_thread_asks_a_thousand_times_a_second_and_not_more() -> None:
    """Else it takes a tenth of a core in every process, all of its life."""
    check_python(
        """
        import torch, torch_npu
        from pathlib import Path
        for _ in range(2):  # it may be younger than the first stream
            with torch.npu.stream(torch.npu.Stream()):
                torch.zeros(4, device="npu").add_(1)
            torch.npu.synchronize()
        tasks = Path("/proc/self/task")
        found = [task.name for task in tasks.iterdir() if (task / "comm").read_text().strip() == "release_thread"]
        assert found, "torch_npu has no such thread any more: runtime/threads.cpp can go"
        assert [Path(f"/proc/{each}/timerslack_ns").read_text().strip() for each in found] == ["1000000"] * len(found)
        """
    )


def test_rays_threads_that_wait_for_channels_sleep_and_others_yield() -> None:
    """Else they share two cores with everything else (preload/yield.cpp). A turn given up is no voluntary switch."""
    check_python(
        """
        import ctypes, os, resource, threading
        def slept(name):
            ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            for _ in range(100):
                os.sched_yield()
            result.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)
        for name, sleeps in (("worker.channel_", True), ("worker.io", False)):
            result = []
            thread = threading.Thread(target=slept, args=(name,))
            thread.start()
            thread.join()
            assert (result[0] >= 100) is sleeps, (name, result)
        """
    )
