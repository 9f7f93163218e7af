"""The processes of one case: `writer` on one node, `readers` on the other. They speak JSON with the benchmark.

A reader acknowledges each message by a datagram: when it had the message, on the machine's clock, and its CPU time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any

import msgspec

from benchmarks.queues.plan import SLOW_S, Case
from benchmarks.queues.ways import WAYS
from vllm_ray_ascend.ipc.sockets import Address

_ACKNOWLEDGEMENT = struct.Struct("!Idd")
_HEADER_BYTES = 300
_DIGITS = 7


def write(case: Case, host: str, acknowledgements: str) -> None:
    """Run a writer of each way; print their addresses, then the figures of each turn."""
    acks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    acks.bind(acknowledgements)
    writers = {way: WAYS[way][0](host, case.readers) for way in case.ways}
    _say({way: msgspec.to_builtins(writer.address) for way, writer in writers.items()})
    for writer in writers.values():
        for _ in range(case.readers):
            writer.recv()
    time.sleep(1.0)  # ZeroMQ's subscriptions
    for number, size, way in case.turns():
        figures = _run_turn(writers[way], acks, case, size)
        _say({"round": number, "size": size, "way": way, **figures})
    os._exit(0)  # what is pending for a slow reader is not waited for


def _run_turn(writer: Any, acks: socket.socket, case: Case, size: int) -> dict[str, Any]:
    fast = case.readers - case.slow
    parts = [os.urandom(_HEADER_BYTES), bytearray(size - _HEADER_BYTES)]
    first_cpu: dict[int, float] = {}
    last_cpu: dict[int, float] = {}
    call_s, thread_cpu_s, all_have_s = [], [], []
    started_cpu = time.process_time()
    for _ in range(case.count_of(size)):
        started, started_thread = time.monotonic(), time.thread_time()
        writer.send_multipart(parts)
        call_s.append(round(time.monotonic() - started, _DIGITS))
        thread_cpu_s.append(round(time.thread_time() - started_thread, _DIGITS))
        received = []
        for _ in range(fast):
            reader, at, cpu = _ACKNOWLEDGEMENT.unpack(acks.recv(64))
            received.append(at - started)
            first_cpu.setdefault(reader, cpu)
            last_cpu[reader] = cpu
        all_have_s.append(round(max(received), _DIGITS))
    own_cpu = time.process_time() - started_cpu
    return {
        "call_s": call_s,
        "thread_cpu_s": thread_cpu_s,
        "all_have_s": all_have_s,
        "writer_cpu_s": own_cpu / len(call_s),
        "readers_cpu_s": sum(last_cpu[each] - first_cpu[each] for each in last_cpu) / max(1, len(call_s) - 1),
    }


def read(case: Case, acknowledgements: str) -> None:
    """Run all readers, each in a process of its own, until they are killed or the last message has come."""
    addresses = msgspec.convert(json.loads(sys.stdin.readline()), dict[str, Address])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for way in case.ways:
        for number in range(case.readers):
            if os.fork() == 0:
                try:
                    _read_messages(case, way, number, addresses[way], acknowledgements)
                finally:
                    os._exit(0)
    for _ in range(len(case.ways) * case.readers):
        os.wait()


def _read_messages(case: Case, way: str, number: int, address: Address, acknowledgements: str) -> None:
    acks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    acks.connect(acknowledgements)
    reader = WAYS[way][1](address)
    is_slow = case.slow and number == 0
    for _ in range(case.messages_of_a_way()):
        if is_slow:
            time.sleep(SLOW_S)
        reader.recv_multipart()
        if not is_slow:
            acks.send(_ACKNOWLEDGEMENT.pack(number, time.monotonic(), time.process_time()))


def _say(message: Any) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    """Run what the benchmark asks for: ROLE CASE HOST ACKNOWLEDGEMENTS."""
    role, case_json, host, acknowledgements = sys.argv[1:]
    case = msgspec.json.decode(case_json, type=Case)
    if role == "writer":
        write(case, host, acknowledgements)
    else:
        read(case, acknowledgements)


if __name__ == "__main__":
    main()
