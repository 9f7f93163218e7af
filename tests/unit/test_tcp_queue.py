"""The TCP connections of a message queue, over real sockets."""

from __future__ import annotations

import contextlib
import gc
import pickle
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.threads import in_thread
from vllm_ray_ascend.ipc.message_parser import frame
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ipc.tcp_queue import TcpQueueReader, TcpQueueWriter

pytestmark = pytest.mark.unit

HOST = "127.0.0.1"
LIMIT_S = 20.0
LARGE = b"x" * 20_000_000
"""More than the kernel takes at once."""


def connect_readers(count: int = 1, **options: int) -> tuple[TcpQueueWriter, list[TcpQueueReader]]:
    writer = TcpQueueWriter(HOST, count, **options)
    readers = [TcpQueueReader(writer.address) for _ in range(count)]
    for _ in readers:
        assert writer.recv() == b""
    return writer, readers


def test_every_reader_gets_every_message_in_order() -> None:
    writer, readers = connect_readers(2)
    messages: list[list[bytes | bytearray | memoryview]] = [
        [b"a"],
        [b"", b"bc", b"d" * 70_000],
        [pickle.dumps({"x": 1})],
        [b"e" * 3_000_000, memoryview(b"f")],
    ]

    def write() -> None:
        for message in messages:
            writer.send_multipart(message, copy=False)

    thread, _ = in_thread(write)
    for reader in readers:
        for message in messages:
            assert reader.poll(10_000)
            assert reader.recv_multipart() == [bytes(part) for part in message]
        assert not reader.poll(0)
    thread.join(10)


def test_messages_of_one_part() -> None:
    writer, (reader,) = connect_readers()
    writer.send(b"READY")
    assert reader.recv() == b"READY"


def test_connections_without_the_token_are_rejected() -> None:
    writer = TcpQueueWriter(HOST, 1)
    with socket.create_connection((HOST, writer.address.port)) as intruder:
        intruder.sendall(b"GET / HTTP/1.1\r\n\r\n")
        reader = TcpQueueReader(writer.address)
        writer.recv()
        writer.send(b"secret")
        assert reader.recv() == b"secret"
        intruder.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while data := intruder.recv(100):
                assert b"secret" not in data


@pytest.mark.parametrize("closed_end", ["writer", "reader"])
def test_a_read_ends_when_either_end_is_closed(closed_end: str) -> None:
    writer, (reader,) = connect_readers()
    thread, found = in_thread(reader.recv_multipart)
    time.sleep(0.05)
    (writer if closed_end == "writer" else reader).close()
    thread.join(10)
    assert isinstance(found[0], ConnectionError) and "the other end of this queue is gone" in str(found[0])


def test_a_write_to_a_closed_reader_fails_and_still_reaches_the_others() -> None:
    writer, (closed, connected) = connect_readers(2)
    closed._socket.close()

    def write() -> None:
        for number in range(1000):
            writer.send(b"%d" % number)

    with pytest.raises(ConnectionError, match="a reader of this queue is gone"):
        write()
    assert connected.recv() == b"0" and connected.recv() == b"1"


def test_a_write_that_waits_ends_when_the_queue_is_closed() -> None:
    writer, (reader,) = connect_readers(max_pending_bytes=1000)
    writer.send(LARGE)
    thread, found = in_thread(lambda: writer.wait_for_space(None))
    writer.close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)
    with pytest.raises(ConnectionError, match="was closed"):
        writer.send(b"x")
    reader.close()


def test_a_write_that_waits_ends_after_its_limit_and_names_the_reader() -> None:
    writer, (stalled, reader) = connect_readers(2, max_pending_bytes=1000)
    writer.send(LARGE)
    assert reader.recv() == LARGE
    with pytest.raises(TimeoutError, match=r"VRA-593: \d+ MiB wait for the reader at 127\.0\.0\.1:\d+"):
        writer.wait_for_space(0.1)
    assert stalled.recv() == LARGE
    writer.wait_for_space(LIMIT_S)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6")
def test_a_reader_over_ipv6_is_named_with_brackets() -> None:
    writer = TcpQueueWriter("[::1]", 1, max_pending_bytes=1000)
    reader = TcpQueueReader(writer.address)
    writer.recv()
    writer.send(LARGE)
    with pytest.raises(TimeoutError, match=r"VRA-593: \d+ MiB wait for the reader at \[::1\]:\d+"):
        writer.wait_for_space(0.1)
    assert reader.recv() == LARGE


def test_a_write_that_waits_goes_on_once_the_reader_reads() -> None:
    writer, (reader,) = connect_readers(max_pending_bytes=1000)
    writer.send(LARGE)
    waiting, found = in_thread(lambda: writer.wait_for_space(LIMIT_S))
    assert reader.recv() == LARGE
    waiting.join(LIMIT_S)
    assert found == [None]


def test_a_reader_that_does_not_read_delays_neither_the_writer_nor_the_others() -> None:
    writer, (stalled, reading) = connect_readers(2)
    for number in range(3):
        writer.wait_for_space(0.0)
        writer.send(b"%d" % number + LARGE)
        assert reading.recv() == b"%d" % number + LARGE
    writer.send(b"small")
    assert reading.recv() == b"small"
    assert [stalled.recv()[:1] for _ in range(4)] == [b"0", b"1", b"2", b"s"]


def test_two_queues_that_send_large_messages_to_each_other_at_once() -> None:
    """From the threads that read, as an executor and a worker without asynchronous scheduling do."""
    there, (here_reader,) = connect_readers()
    back, (there_reader,) = connect_readers()

    def exchange(writer: TcpQueueWriter, reader: TcpQueueReader) -> bytes:
        writer.send(LARGE)
        return reader.recv()

    ends = [in_thread(lambda: exchange(there, there_reader)), in_thread(lambda: exchange(back, here_reader))]
    for thread, found in ends:
        thread.join(LIMIT_S)
        assert found == [LARGE]


def test_what_is_pending_does_not_change_with_the_senders_buffer() -> None:
    """vLLM fills the array of one step's grammar bitmask again for the next."""
    writer, (reader,) = connect_readers()
    buffer = bytearray(LARGE)
    writer.send_multipart([buffer, memoryview(buffer)])
    buffer[:] = bytes(len(buffer))
    assert reader.recv_multipart() == [LARGE, LARGE]


def test_a_message_of_which_only_a_part_has_arrived_does_not_block_a_poll() -> None:
    """A writer that is stopped while it sends: reads end by their own limit."""
    writer, (reader,) = connect_readers()
    connection = writer._outbox._readers[0].connection
    whole = b"".join(map(bytes, frame([b"x" * 1000, b"y"])))
    for start, end in ((0, 3), (3, 500), (500, len(whole) - 1)):
        connection.sendall(whole[start:end])
        assert not reader.poll(50)
    connection.sendall(whole[-1:])
    assert reader.poll(LIMIT_S * 1000) and reader.recv_multipart() == [b"x" * 1000, b"y"]


def test_what_is_no_message_ends_the_connection() -> None:
    writer, (reader,) = connect_readers()
    writer._outbox._readers[0].connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionError, match="VRA-591"):
        reader.recv()


def test_a_reader_that_is_lost_while_something_is_pending() -> None:
    writer, (lost, connected) = connect_readers(2)
    writer.send(LARGE)
    assert connected.recv() == LARGE
    lost._socket.close()

    def exchange() -> None:
        for _ in range(1000):
            writer.send(b"x")
            assert connected.recv() == b"x"

    with pytest.raises(ConnectionError, match="a reader of this queue is gone"):
        exchange()
    assert connected.recv() == b"x"


def test_waiting_for_a_reader_ends_when_the_queue_is_closed() -> None:
    writer = TcpQueueWriter(HOST, 1)
    assert not writer.poll(10)
    thread, found = in_thread(writer.recv)
    writer.close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)


def test_a_writer_listens_until_all_readers_are_there() -> None:
    writer, _ = connect_readers(2)
    with pytest.raises(OSError, match=r"refused|reset|VRA-590"):
        TcpQueueReader(writer.address)


def test_an_unreferenced_writer_ends_its_threads() -> None:
    """While it waits for a reader, and while something is pending."""
    ours = ("RayAscendQueueListener", "RayAscendQueueSender")
    before = [thread for thread in threading.enumerate() if thread.name in ours]
    waiting = TcpQueueWriter(HOST, 1)
    writer, (reader,) = connect_readers()
    writer.send(LARGE)
    started = [thread for thread in threading.enumerate() if thread.name in ours and thread not in before]
    assert {thread.name for thread in started} == set(ours)
    del waiting, writer
    gc.collect()
    for thread in started:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    reader.close()


def test_a_writer_that_does_not_listen() -> None:
    with socket.create_server((HOST, 0)) as free:
        address = Address(HOST, free.getsockname()[1], "0" * 32)
    with pytest.raises(OSError, match="refused"):
        TcpQueueReader(address)
