"""Our message queue over vLLM's real one: shared memory and TCP at once, ends that are cancelled, and nothing left."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.threads import in_thread
from vllm_ray_ascend.executor.queues import CancellableQueue

LIMIT_S = 20.0
REMOTE = 7
"""A reader that is not among the local ones of the handle."""


@pytest.fixture
def ends() -> Iterator[list[CancellableQueue]]:
    """A writer, a reader over shared memory and one over TCP, ready."""
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
    assert near.working_on == far.working_on == "execute_model"


def test_shared_memory_has_no_name_once_all_are_ready(ends: list[CancellableQueue]) -> None:
    name = ends[0].segment()
    assert name is not None and ends[1].segment() == name
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


def test_a_writer_that_is_gone_is_said_to_be(ends: list[CancellableQueue]) -> None:
    thread, found = in_thread(lambda: ends[2].dequeue(indefinite=True))
    ends[0].close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)


def test_a_wait_for_ends_that_never_come_is_cancelled() -> None:
    writer = CancellableQueue(2, 1, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
    thread, found = in_thread(writer.wait_until_ready)
    writer.cancel(RuntimeError("the engine has ended"))
    thread.join(LIMIT_S)
    assert str(found[0]) == "the engine has ended"
    writer.close()


def test_queues_that_nobody_holds_are_collected() -> None:
    """ZeroMQ's context waits for its sockets, for good where the collector takes it first."""

    def forget() -> None:
        for local in (0, 1):
            CancellableQueue(1, local, connect_ip="127.0.0.1", max_chunk_bytes=1 << 20)
        gc.collect()

    thread, found = in_thread(forget)
    thread.join(LIMIT_S)
    assert not thread.is_alive() and found == [None]
