"""ACL graphs: capture records and does not run, replay runs what was recorded, CANN's capture rules hold."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
import torch

from tests.softnpu.device import gated
from tests.softnpu.processes import check_python
from tests.softnpu.runtime import (
    CAPTURE_INVALIDATED,
    EVENT_CAPTURED,
    FORBIDDEN_IN_CAPTURE,
    NO_STREAM,
    STREAM_CAPTURED,
    STREAM_UNJOINED,
    WAIT_TIMEOUT,
)
from vllm_ray_ascend.accelerators.choose import get_accelerator

WATCH = 'from vllm_ray_ascend.accelerators.choose import get_accelerator; get_accelerator("npu").watch_captures()'
"""Else a capture that fails here would fail all later ones, with a torch_npu that leaves its pool in use."""


@pytest.fixture(autouse=True, scope="module")
def captures_are_watched() -> None:
    get_accelerator("npu").watch_captures()


def captured(body: Callable[[], object]) -> torch.npu.NPUGraph:
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        body()
    return graph


def ones(count: int = 4) -> torch.Tensor:
    return torch.ones(count, device="npu")


def test_capture_runs_nothing_and_replay_takes_new_inputs() -> None:
    x, y = ones(), torch.zeros(4, device="npu")
    graph = captured(lambda: y.copy_(x * 2 + 1))
    assert y.tolist() == [0.0] * 4
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [value * 2 + 1] * 4


def test_operators_in_place_are_not_executed_by_the_capture() -> None:
    x = ones()

    def body() -> None:
        x.add_(1)
        x.mul_(2)
        x[1:3].zero_()

    graph = captured(body)
    assert x.tolist() == [1.0] * 4
    graph.replay()
    assert x.tolist() == [4.0, 0.0, 0.0, 4.0]


def test_index_operators_are_captured_with_any_index() -> None:
    table, index = (
        torch.arange(10.0, device="npu"),
        torch.full((3,), 10**6, device="npu"),
    )  # no valid index during the capture
    rows = torch.zeros(10, device="npu")
    result: list[torch.Tensor] = []

    def body() -> None:
        result.append(table.index_select(0, index))
        result.append(table[index])
        result.append(torch.gather(table, 0, index))
        rows.index_put_((index,), torch.full((3,), 7.0, device="npu"))

    graph = captured(body)
    for wanted in ([1, 2, 3], [9, 0, 5]):
        index.copy_(torch.tensor(wanted))
        rows.zero_()
        graph.replay()
        assert [tensor.tolist() for tensor in result] == [[float(i) for i in wanted]] * 3
        assert rows.nonzero().flatten().tolist() == sorted(wanted)


def test_fork_and_join_of_two_streams() -> None:
    x, out = ones(), torch.zeros(4, device="npu")
    side = torch.npu.Stream()

    def body() -> None:
        main = torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            doubled = x * 2
        tripled = x * 3
        main.wait_stream(side)
        out.copy_(doubled + tripled)

    graph = captured(body)
    side.synchronize()  # the capture has released it
    x.fill_(2.0)
    graph.replay()
    assert out.tolist() == [10.0] * 4


def test_replay_is_asynchronous_and_in_the_order_of_its_stream() -> None:
    stream, x = torch.npu.Stream(), torch.zeros(4, device="npu")
    graph = captured(lambda: x.add_(1))
    with gated(stream) as gate:
        with torch.npu.stream(stream):
            graph.replay()
            x.mul_(10)
            graph.replay()
        assert not stream.query()
        gate.open()
        stream.synchronize()
    assert x.tolist() == [11.0] * 4


def test_events_recorded_before_and_after_a_replay() -> None:
    stream, consumer = torch.npu.Stream(), torch.npu.Stream()
    x, seen, event = torch.zeros(4, device="npu"), torch.zeros(4, device="npu"), torch.npu.Event()
    graph = captured(lambda: x.add_(1))
    with gated(stream) as gate:
        with torch.npu.stream(stream):
            graph.replay()
            event.record(stream)
        event.wait(consumer)
        with torch.npu.stream(consumer):
            seen.copy_(x)
        gate.open()
        consumer.synchronize()
    assert seen.tolist() == [1.0] * 4


def test_external_event_inside_a_graph_holds_the_replay() -> None:
    x, event, opener = torch.zeros(4, device="npu"), torch.npu.ExternalEvent(), torch.npu.Stream()

    def body() -> None:
        event.wait(torch.npu.current_stream())
        event.reset(torch.npu.current_stream())
        x.add_(1)

    graph, stream = captured(body), torch.npu.Stream()
    for count in (1, 2):  # the graph resets the event, so each replay waits again
        with torch.npu.stream(stream):
            graph.replay()
        assert not stream.query()
        event.record(opener)
        stream.synchronize()
        assert x.tolist() == [float(count)] * 4


def test_task_group_is_updated_between_replays() -> None:
    query = torch.randn(4, 2, 8, device="npu")
    key, value = torch.randn(6, 2, 8, device="npu"), torch.randn(6, 2, 8, device="npu")
    out = [torch.zeros(4, 2, 8, device="npu"), torch.zeros(1, device="npu")]

    def attend(key_end: int) -> None:
        torch.ops.npu.npu_fused_infer_attention_score.out(
            query, key, value, num_heads=2, input_layout="TND", scale=1.0,
            actual_seq_lengths=[4], actual_seq_lengths_kv=[key_end], out=out,
        )  # fmt: skip

    def expected(key_end: int) -> torch.Tensor:
        heads = [tensor.cpu().transpose(0, 1) for tensor in (query, key[:key_end], value[:key_end])]
        return torch.nn.functional.scaled_dot_product_attention(*heads, scale=1.0).transpose(0, 1)

    handles: list[object] = []
    event, update_stream = torch.npu.ExternalEvent(), torch.npu.Stream()

    def body() -> None:
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        attend(key_end=3)
        handles.append(torch.npu.graph_task_group_end(stream))

    graph = captured(body)
    for key_end in (3, 6, 1):
        graph.replay()
        with torch.npu.stream(update_stream):
            torch.npu.graph_task_update_begin(update_stream, handles[0])
            attend(key_end)
            torch.npu.graph_task_update_end(update_stream)
            event.record(update_stream)
        torch.npu.synchronize()
        torch.testing.assert_close(out[0].cpu(), expected(key_end))


def broken_capture(body: Callable[[], object], mode: str = "global") -> tuple[str, str]:
    """Capture ``body``; return the error that it raised itself (or ""), and that of the capture's end (or "")."""
    inside = ending = ""
    torch.npu.synchronize()
    try:
        with torch.npu.graph(torch.npu.NPUGraph(), capture_error_mode=mode):
            try:
                body()
            except RuntimeError as error:
                inside = str(error)
                raise
    except RuntimeError as error:
        ending = str(error)
    return inside, ending


# Refused by the runtime, as CANN refuses it: the error code, and the capture is broken.
FORBIDDEN: dict[str, tuple[Callable[[torch.Tensor], object], int]] = {
    "synchronise the stream": (lambda x: torch.npu.current_stream().synchronize(), STREAM_CAPTURED),
    "synchronise the device": (lambda x: torch.npu.synchronize(), FORBIDDEN_IN_CAPTURE),
    "synchronise an event": (lambda x: torch.npu.current_stream().record_event().synchronize(), EVENT_CAPTURED),
    "copy to the host": (lambda x: x.cpu(), FORBIDDEN_IN_CAPTURE),
    "copy from the host": (lambda x: x.copy_(torch.ones(4)), FORBIDDEN_IN_CAPTURE),
    "read a number": (lambda x: x[0].item(), STREAM_CAPTURED),
}


@pytest.mark.parametrize(("call", "code"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_forbidden_call_breaks_the_capture(call: Callable[[torch.Tensor], object], code: int) -> None:
    x = ones()
    inside, ending = broken_capture(lambda: call(x))
    assert f"error code is {code}" in inside
    assert f"error code is {CAPTURE_INVALIDATED}" in ending
    assert (x + 1).tolist() == [2.0] * 4  # the device stays usable


# Refused by the software NPU's operators: the operator and the reason are named.
NOT_CAPTURABLE: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "random": (lambda x: x.exponential_(), "aten::exponential_ cannot be captured .*: it draws random numbers"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero cannot be captured .*: its shapes are not known"),
    "mask": (lambda x: x[x > 0], "aten::index.Tensor cannot be captured .*: its shapes are not known"),
    "equal": (lambda x: torch.equal(x, x + 1), "aten::equal cannot be captured .*: it returns a plain value"),
}


@pytest.mark.parametrize(("call", "message"), NOT_CAPTURABLE.values(), ids=NOT_CAPTURABLE.keys())
def test_operator_that_cannot_be_captured_says_why(call: Callable[[torch.Tensor], object], message: str) -> None:
    x = ones()
    assert re.search(message, broken_capture(lambda: call(x))[0])
    assert (x + 1).tolist() == [2.0] * 4


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_call_of_another_thread_breaks_a_global_capture_only(mode: str) -> None:
    x, y, errors = ones(), ones(), [""]

    def copy() -> None:
        torch.npu.set_device(0)
        try:
            y.copy_(torch.zeros(4))
        except RuntimeError as error:
            errors[0] = str(error)

    def body() -> None:
        x.add_(1)
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()

    ending = broken_capture(body, mode)[1]
    if mode == "global":
        assert f"error code is {FORBIDDEN_IN_CAPTURE}" in errors[0]
        assert f"error code is {CAPTURE_INVALIDATED}" in ending
    else:
        assert [*errors, ending] == ["", ""]
        assert y.tolist() == [0.0] * 4


def test_stream_that_is_not_joined_back() -> None:
    side, x = torch.npu.Stream(), ones()

    def body() -> None:
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            x.add_(1)

    assert f"error code is {STREAM_UNJOINED}" in broken_capture(body)[1]
    side.synchronize()  # free again
    assert x.tolist() == [1.0] * 4


def test_graphs_hold_streams_until_they_are_destroyed() -> None:
    check_python(
        f"""
        import gc, torch, torch_npu
        {WATCH}
        side, event, x = torch.npu.Stream(), torch.npu.Event(), torch.ones(4, device="npu")

        def capture():  # two streams: each costs one of the budget for as long as the graph lives
            graph = torch.npu.NPUGraph()
            with torch.npu.graph(graph):
                event.record()
                event.wait(side)
                with torch.npu.stream(side):
                    x.add_(1)
                event.record(side)
                event.wait()
            return graph

        def fill():
            graphs = []
            try:
                for _ in range(100):
                    graphs.append(capture())
            except RuntimeError as error:
                assert "error code is {NO_STREAM}" in str(error) and "SOFTNPU_STREAMS" in str(error), error
            return graphs

        graphs = fill()
        assert 5 <= len(graphs) < 50, len(graphs)
        count = len(graphs)
        graphs[0].replay()
        torch.npu.synchronize()
        assert x.tolist() == [2.0] * 4
        graphs.clear()
        gc.collect()
        assert len(fill()) == count  # the event, which was recorded in each, holds none of them
        """,
        SOFTNPU_STREAMS="64",
    )


def test_capture_failure_and_a_replay_that_times_out() -> None:
    check_python(
        f"""
        import os, torch, torch_npu
        {WATCH}
        x, events = torch.zeros(4, device="npu"), []

        def capture():
            graph, event = torch.npu.NPUGraph(), torch.npu.ExternalEvent()
            events.append(event)
            with torch.npu.graph(graph):
                event.wait()
                x.add_(1)
            return graph

        graph = capture()
        try:
            capture()
        except RuntimeError as error:
            assert "error code is {CAPTURE_INVALIDATED}" in str(error) and "SOFTNPU_FAULTS" in str(error), error
        else:
            raise SystemExit("the second capture succeeded")
        capture()  # the third: the fault was for the second only

        stream = torch.npu.Stream()
        with torch.npu.stream(stream):
            graph.replay()
        try:
            stream.synchronize()
        except RuntimeError as error:
            assert "error code is {WAIT_TIMEOUT}" in str(error) and "SOFTNPU_WAIT_LIMIT" in str(error), error
        else:
            raise SystemExit("the replay did not wait")
        os._exit(0)
        """,
        SOFTNPU_FAULTS="capture:nth=2",
        SOFTNPU_WAIT_LIMIT="0.2",
    )
