"""The TCP connections of a message queue, over real sockets."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time

import pytest

from tests.threads import in_thread
from vllm_ray_ascend.lifecycle.messages import Address
from vllm_ray_ascend.lifecycle.wire import Reader, Writer

pytestmark = pytest.mark.unit

HOST = "127.0.0.1"


def connected(readers: int = 1) -> tuple[Writer, list[Reader]]:
    writer = Writer(HOST, lambda: None)
    ends = [Reader(writer.address) for _ in range(readers)]
    for _ in ends:
        assert writer.recv() == b""
    return writer, ends


def test_every_reader_gets_every_message_in_order() -> None:
    writer, readers = connected(2)
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


def test_one_part_is_what_the_start_says() -> None:
    writer, (reader,) = connected()
    writer.send(b"READY")
    assert reader.recv() == b"READY"


def test_a_stranger_is_no_reader() -> None:
    writer = Writer(HOST, lambda: None)
    with socket.create_connection((HOST, writer.address.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        reader = Reader(writer.address)
        writer.recv()
        writer.send(b"secret")
        assert reader.recv() == b"secret"
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""


@pytest.mark.parametrize("end", ["writer", "reader"])
def test_a_read_ends_when_either_end_is_closed(end: str) -> None:
    writer, (reader,) = connected()
    thread, found = in_thread(reader.recv_multipart)
    time.sleep(0.05)
    (writer if end == "writer" else reader).close()
    thread.join(10)
    assert isinstance(found[0], ConnectionError) and "the other end of this queue is gone" in str(found[0])


def test_a_write_to_a_reader_that_is_gone_is_an_error_and_the_others_have_it() -> None:
    writer, (gone, there) = connected(2)
    gone._socket.close()

    def write() -> None:
        for number in range(1000):
            writer.send(b"%d" % number)

    with pytest.raises(ConnectionError, match="a reader of this queue is gone"):
        write()
    assert there.recv() == b"0" and there.recv() == b"1"


def test_a_write_that_nobody_reads_ends_when_the_queue_is_closed() -> None:
    writer, (reader,) = connected()
    thread, found = in_thread(lambda: writer.send(b"x" * 100_000_000))
    time.sleep(0.1)
    writer.close()
    thread.join(10)
    assert isinstance(found[0], ConnectionError)
    reader.close()


def test_waiting_for_a_reader_ends_with_what_the_check_raises() -> None:
    ended = threading.Event()

    def check() -> None:
        if ended.is_set():
            raise ValueError("the engine has ended")

    writer = Writer(HOST, check)
    thread, found = in_thread(writer.recv)
    ended.set()
    thread.join(10)
    assert isinstance(found[0], ValueError)


def test_a_writer_that_is_not_there() -> None:
    with socket.create_server((HOST, 0)) as free:
        address = Address(HOST, free.getsockname()[1], "0" * 32)
    with pytest.raises(OSError, match="refused"):
        Reader(address)
