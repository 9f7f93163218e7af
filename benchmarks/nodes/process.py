"""A process with the ends of many ranks of simulated nodes.

Its arguments are the path of a datagram socket for acknowledgements, and JSON: the writer's address, the relays, and
the ranks. The ends are real; a few processes have them all, as a thousand processes do not fit the machine. An end that
hands messages on does so before the ends that it hands them to are looked at.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from vllm_ray_ascend.ipc.relay import Relay, RelayedReader, RelayingReader, open_reader
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ipc.tcp_queue import QueueReader, TcpQueueReader


class Ends(msgspec.Struct):
    """What a process has to know."""

    address: Address
    relays: list[Relay]
    ranks: list[int]


def main(acknowledgements: str, ends_json: str) -> None:
    """Read all messages, until the writer is gone. For each message of all ranks: when the last had it, CPU seconds."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ends = msgspec.json.decode(ends_json, type=Ends)
    readers = _connect([open_reader(ends.address, ends.relays, rank) for rank in ends.ranks])
    acks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    acks.connect(acknowledgements)
    poll = select.epoll()
    for number in readers:
        poll.register(number, select.EPOLLIN)
    read = 0
    while True:
        for number, _ in poll.poll():
            readers[number].recv_multipart()
            read += 1
            if read % len(readers) == 0:
                acks.send(json.dumps([time.monotonic(), time.process_time()]).encode())


def _connect(readers: list[QueueReader]) -> dict[int, QueueReader]:
    """Have all ends connect; return each by the number of its connection."""
    others = [reader for reader in readers if isinstance(reader, RelayedReader)]
    with ThreadPoolExecutor(8) as pool:
        for other, connection in zip(others, pool.map(RelayedReader._connect, others), strict=True):
            other._socket = connection
    for reader in readers:
        if isinstance(reader, RelayingReader):
            assert reader._writer.accept_readers(time.monotonic() + 60)
    return {_connection(reader).fileno(): reader for reader in readers}


def _connection(reader: QueueReader) -> socket.socket:
    end = reader._reader if isinstance(reader, RelayingReader) else reader
    assert isinstance(end, TcpQueueReader | RelayedReader)
    connection = end._socket
    assert connection is not None
    return connection


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ConnectionError:
        os._exit(0)
