"""Our message queue over vLLM's real one: shared memory and TCP at once, cancelled ends, and nothing left behind."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.threads import in_thread
from vllm_ray_ascend.errors import WorkerFailedError
from vllm_ray_ascend.executor.startup import StartupRayProxy
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.ipc.message_queue import CancellableQueue, ExecutorQueues, ranks_of_other_nodes, ranks_on_node
from vllm_ray_ascend.settings import Settings

LIMIT_S = 20.0
REMOTE = 7
"""A reader that is not among the local ones of the handle."""


@pytest.fixture
def ends() -> Iterator[list[CancellableQueue]]:
    """Return a writer, a reader over shared memory and one over TCP, ready."""
    writer = CancellableQueue(2, 1, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
    handle = writer.export_handle()
    queues = [
        writer,
        CancellableQueue.create_from_handle(handle, 0),
        CancellableQueue.create_from_handle(handle, REMOTE),
    ]
    threads = [threading.Thread(target=queue.wait_until_ready) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    yield queues
    for queue in queues:
        queue.close()


def test_both_kinds_of_readers_get_small_and_large_objects(ends: list[CancellableQueue]) -> None:
    writer, near, far = ends
    small: Any = ("execute_model", (1,), {})
    large = torch.arange(3_000_000, dtype=torch.float32)
    for item in (small, large, small):
        thread = threading.Thread(target=writer.enqueue, args=(item,))
        thread.start()
        for reader in (near, far):
            got = reader.dequeue(timeout=LIMIT_S)
            assert torch.equal(got, large) if item is large else got == small
        thread.join(LIMIT_S)
    assert near.current_method == far.current_method == "execute_model"


def test_shared_memory_has_no_name_once_all_are_ready(ends: list[CancellableQueue]) -> None:
    name = ends[0].segment_name()
    assert name is not None and ends[1].segment_name() == name
    assert not (Path("/dev/shm") / name).exists()
    ends[0].enqueue("still there")
    assert ends[1].dequeue(timeout=LIMIT_S) == "still there"


@pytest.mark.parametrize("reader", [1, 2], ids=["shared memory", "TCP"])
def test_a_read_ends_with_what_cancels_it(ends: list[CancellableQueue], reader: int) -> None:
    thread, found = in_thread(lambda: ends[reader].dequeue(indefinite=True))
    ends[reader].cancel(SystemExit(3))
    thread.join(LIMIT_S)
    assert isinstance(found[0], SystemExit) and found[0].code == 3
    with pytest.raises(SystemExit):
        ends[reader].dequeue()


def test_a_closed_writer_raises_in_its_reader(ends: list[CancellableQueue]) -> None:
    thread, found = in_thread(lambda: ends[2].dequeue(indefinite=True))
    ends[0].close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)


def test_a_wait_for_ends_that_never_connect_is_cancelled() -> None:
    writer = CancellableQueue(2, 1, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
    thread, found = in_thread(writer.wait_until_ready)
    writer.cancel(RuntimeError("the engine has ended"))
    thread.join(LIMIT_S)
    assert str(found[0]) == "the engine has ended"
    writer.close()


def new_queue(n_reader: int, n_local_reader: int, **options: Any) -> CancellableQueue:
    return CancellableQueue(n_reader, n_local_reader, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20, **options)


def make_ready(queues: list[CancellableQueue]) -> None:
    waits = [in_thread(queue.wait_until_ready) for queue in queues]
    for thread, found in waits:
        thread.join(LIMIT_S)
        assert found == [None]


class NotReadyError(Exception):
    """What a check of readiness raises."""


def give_up() -> None:
    raise NotReadyError


@pytest.mark.parametrize("near", [0, 1], ids=["TCP", "shared memory"])
@pytest.mark.parametrize("end", ["writer", "reader"])
def test_a_wait_for_ends_that_never_connect_ends_with_what_the_check_raises(near: int, end: str) -> None:
    """The writer waits for its reader, or the reader for its writer's first message."""
    writer = new_queue(1, near)
    reader = CancellableQueue.create_from_handle(writer.export_handle(), 0) if end == "reader" else None
    queue = reader or writer
    queue.check_ready = give_up
    thread, found = in_thread(queue.wait_until_ready)
    thread.join(LIMIT_S)
    assert found and isinstance(found[0], NotReadyError)
    for each in filter(None, (reader, writer)):
        each.close()


@pytest.mark.parametrize("cause", ["limit", "failure"])
def test_a_start_waits_for_its_queues_within_the_limit_of_the_phase(cause: str) -> None:
    """And no longer than until a worker has failed."""
    settings = Settings(device_limit_s=0.2 if cause == "limit" else 0)
    supervisor = WorkerSupervisor(list, settings, 60.0)
    startup = StartupRayProxy(supervisor, settings)
    queues = ExecutorQueues(None, list, lambda: startup.check_queues_ready(range(2)))
    writer = queues(2, 0, connect_ip="127.0.0.1")
    thread, found = in_thread(writer.wait_until_ready)
    if cause == "failure":
        supervisor.fail(WorkerFailedError("VRA-999", "rank 1 failed"))
    thread.join(LIMIT_S)
    expected = "message queues: ranks [0, 1] are not ready after 0.2 s" if cause == "limit" else "rank 1 failed"
    assert found and expected in str(found[0])
    writer.close()


@pytest.mark.parametrize("end", [0, 1], ids=["writer", "reader"])
def test_a_wait_for_ends_over_tcp_is_cancelled(end: int) -> None:
    writer = new_queue(2, 0)
    ends = [writer, CancellableQueue.create_from_handle(writer.export_handle(), 0)]
    thread, found = in_thread(ends[end].wait_until_ready)
    ends[end].cancel(RuntimeError("the engine has ended"))
    thread.join(LIMIT_S)
    assert str(found[0]) == "the engine has ended"
    for each in ends:
        each.close()


def fill(writer: CancellableQueue, message: object) -> Any:
    """Write ``message`` again and again, in a thread of its own."""

    def write() -> None:
        for _ in range(1000):
            writer.enqueue(message)

    return in_thread(write)


MESSAGES: dict[str, tuple[int, object]] = {"TCP": (0, bytes(8_000_000)), "shared memory": (1, "small")}


@pytest.mark.parametrize("case", MESSAGES)
def test_writes_that_nobody_reads_are_cancelled(case: str) -> None:
    near, message = MESSAGES[case]
    writer = new_queue(1, near)
    reader = CancellableQueue.create_from_handle(writer.export_handle(), 0)
    make_ready([writer, reader])
    thread, found = fill(writer, message)
    thread.join(0.5)
    assert thread.is_alive()
    writer.cancel(RuntimeError("the engine has ended"))
    thread.join(LIMIT_S)
    assert found and str(found[0]) == "the engine has ended"
    with pytest.raises(RuntimeError, match="the engine has ended"):
        writer.enqueue("more")
    reader.close()
    writer.close()


@pytest.mark.parametrize("case", MESSAGES)
def test_writes_that_nobody_reads_end_after_their_limit(case: str) -> None:
    """For all readers or for none: what was not written to one is not written to another."""
    near, message = MESSAGES[case]
    writer = new_queue(2, near, local_reader_ranks=[1][:near])
    readers = [CancellableQueue.create_from_handle(writer.export_handle(), rank) for rank in (0, 1)]
    make_ready([writer, *readers])
    writer.write_limit_s = 0.3
    stalled, reading = readers if case == "TCP" else reversed(readers)
    written = 0

    def write() -> None:
        nonlocal written
        while written < 1000:
            writer.enqueue(message)
            written += 1
            assert reading.dequeue(timeout=LIMIT_S) == message

    thread, found = in_thread(write)
    thread.join(LIMIT_S)
    assert isinstance(found[0], TimeoutError)
    assert ("VRA-593" if case == "TCP" else "VRA-595: readers [1]") in str(found[0])
    with pytest.raises(TimeoutError):
        reading.dequeue(timeout=0.2)
    for _ in range(written):
        assert stalled.dequeue(timeout=LIMIT_S) == message
    writer.enqueue("and on")
    assert stalled.dequeue(timeout=LIMIT_S) == reading.dequeue(timeout=LIMIT_S) == "and on"
    for each in (*readers, writer):
        each.close()


def test_large_messages_in_both_directions_at_once() -> None:
    """An executor that writes a step and a worker that answers in the thread that reads."""
    requests, answers = new_queue(1, 0), new_queue(1, 0)
    ends = [CancellableQueue.create_from_handle(queue.export_handle(), 0) for queue in (requests, answers)]
    make_ready([requests, answers, *ends])
    large = torch.arange(5_000_000, dtype=torch.float32)

    def exchange(writer: CancellableQueue, reader: CancellableQueue) -> bool:
        for _ in range(3):
            writer.enqueue(large)
        return all(torch.equal(reader.dequeue(timeout=LIMIT_S), large) for _ in range(3))

    sides = [in_thread(lambda: exchange(requests, ends[1])), in_thread(lambda: exchange(answers, ends[0]))]
    for thread, found in sides:
        thread.join(3 * LIMIT_S)
        assert found == [True]
    for each in (*ends, requests, answers):
        each.close()


def test_local_ranks_may_be_any() -> None:
    """VLLM_RAY_BUNDLE_INDICES=2,3,0,1: the driver's ranks are 2 and 3."""
    nodes = ["other", "other", "driver", "driver"]
    bundles = [((rank + 2) % 4, node, "192.0.2.1") for rank, node in enumerate(nodes)]
    queues = ExecutorQueues(5.0, lambda: ranks_on_node(bundles, "driver"), lambda: None)
    writer = queues(4, 2, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
    assert writer.write_limit_s == 5.0
    readers = [queues.create_from_handle(writer.export_handle(), rank) for rank in range(4)]
    assert [reader.segment_name() is not None for reader in readers] == [False, False, True, True]
    make_ready([writer, *readers])
    writer.enqueue("to all")
    assert [reader.dequeue(timeout=LIMIT_S) for reader in readers] == ["to all"] * 4
    for each in (*readers, writer):
        each.close()


BUNDLES = [(rank, node, "192.0.2.1") for rank, node in enumerate(["driver", "a", "a", "a", "b", "driver"])]
"""Of six ranks, on three nodes."""


@pytest.fixture
def engine() -> Iterator[list[CancellableQueue]]:
    """Return the executor's queue to the ranks of BUNDLES, and then each rank's end, ready."""
    queues = ExecutorQueues(
        LIMIT_S,
        lambda: ranks_on_node(BUNDLES, "driver"),
        lambda: None,
        lambda: ranks_of_other_nodes(BUNDLES, "driver"),
    )
    writer = queues(6, 2, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
    handle = pickle.loads(pickle.dumps(writer.export_handle()))  # as Ray passes it
    ends = [writer, *(CancellableQueue.create_from_handle(handle, rank) for rank in range(6))]
    make_ready(ends)
    yield ends
    for each in ends:
        each.close()


def test_ranks_of_one_node_share_a_connection_and_get_everything(engine: list[CancellableQueue]) -> None:
    writer, *ranks = engine
    assert writer.n_remote_reader == 2
    large = torch.arange(4_000_000, dtype=torch.float32)
    for item in ("small", large, "next"):
        thread, found = in_thread(lambda item=item: writer.enqueue(item))  # type: ignore[misc]
        reads = [in_thread(lambda rank=rank: rank.dequeue(timeout=LIMIT_S)) for rank in ranks]  # type: ignore[misc]
        for read, got in reads:
            read.join(2 * LIMIT_S)
            assert torch.equal(got[0], large) if item is large else got == [item]
        thread.join(LIMIT_S)
        assert found == [None]


def test_a_rank_that_hands_on_is_cancelled_and_the_others_hear_why(engine: list[CancellableQueue]) -> None:
    """The first rank may be stopped sooner than the others of its node."""
    _, _, first, second, third, *_ = engine
    reads = [in_thread(lambda rank=rank: rank.dequeue(indefinite=True)) for rank in (first, second, third)]  # type: ignore[misc]
    first.cancel(SystemExit(1))
    reads[0][0].join(LIMIT_S)
    second.cancel(SystemExit(2))
    third.cancel(SystemExit(3))
    for number, (thread, found) in enumerate(reads, 1):
        thread.join(LIMIT_S)
        assert isinstance(found[0], SystemExit) and found[0].code == number


def test_a_rank_without_room_is_known_while_its_first_rank_waits(engine: list[CancellableQueue]) -> None:
    writer, _, first, second, _, *_ = engine
    fill(writer, bytes(50_000))

    def read() -> None:
        while True:
            first.dequeue(timeout=LIMIT_S)

    thread, found = in_thread(read)
    deadline = time.monotonic() + LIMIT_S
    while first.late_readers() != [2, 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.late_readers() == [2, 3]
    writer.cancel(RuntimeError("the engine has ended"))
    first.cancel(RuntimeError("the engine has ended"))
    thread.join(LIMIT_S)
    assert str(found[0]) == "the engine has ended"
    assert second.dequeue(timeout=LIMIT_S) == bytes(50_000)


def test_unreferenced_queues_are_collected() -> None:
    """ZeroMQ's context waits for its sockets, forever where the collector takes it first."""

    def create_and_drop() -> None:
        for local in (0, 1):
            CancellableQueue(1, local, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
        gc.collect()

    thread, found = in_thread(create_and_drop)
    thread.join(LIMIT_S)
    assert not thread.is_alive() and found == [None]
