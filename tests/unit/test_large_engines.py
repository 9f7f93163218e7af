"""What is derived from the number of ranks: files, connections, times of a shutdown, the order of pipeline pairs."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.threads import in_thread
from vllm_ray_ascend.control.open_files import files_needed, simultaneous_connections
from vllm_ray_ascend.control.protocol import REQUEST_STATUS, StatusReport, decode_message
from vllm_ray_ascend.control.server import ControlServer, Peer
from vllm_ray_ascend.control.timeouts import engine_exit_s, stop_grace_s
from vllm_ray_ascend.executor.pipeline_warmup import adjacent_stages
from vllm_ray_ascend.ipc.authentication import MAX_HANDSHAKES
from vllm_ray_ascend.ipc.tcp_queue import TcpQueueWriter

pytestmark = pytest.mark.unit

SERVER = """
import resource, sys
from vllm_ray_ascend.control.server import ControlServer
resource.setrlimit(resource.RLIMIT_NOFILE, (200, int(sys.argv[1])))
server = ControlServer("127.0.0.1", 30.0, print, processes=int(sys.argv[2]))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def backlog(listener: socket.socket) -> int:
    """Return what the kernel has for a socket that listens: `tcpi_sacked` of struct tcp_info."""
    (found,) = struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
    return int(found)


def expected_backlog(clients: int) -> int:
    return min(clients, int(Path("/proc/sys/net/core/somaxconn").read_text()))


def start_server(hard: int, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SERVER, str(hard), str(processes)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_server_raises_the_limit_of_open_files_as_far_as_its_processes_need() -> None:
    done = start_server(hard=4000, processes=512)
    assert done.stdout.strip() == str(files_needed(512)), done.stderr


def test_a_limit_that_cannot_be_raised_is_an_error_that_says_how_to_raise_it() -> None:
    done = start_server(hard=1024, processes=512)
    assert "VRA-333" in done.stderr and "1024" in done.stderr and f"ulimit -n {files_needed(512)}" in done.stderr


@pytest.mark.parametrize("processes", [1, 64, 2048])
def test_all_connections_of_all_ranks_may_wait_to_be_accepted(processes: int) -> None:
    server = ControlServer("127.0.0.1", 30.0, print, processes=processes)
    assert simultaneous_connections(processes) == MAX_HANDSHAKES + 3 * processes
    assert backlog(server._listener._socket) == expected_backlog(MAX_HANDSHAKES + 3 * processes)
    server.close()


def test_all_readers_of_a_queue_may_connect_at_the_same_time() -> None:
    writer = TcpQueueWriter("127.0.0.1", 300)
    assert backlog(writer._listener._socket) == expected_backlog(MAX_HANDSHAKES + 300)
    writer.close()


class CountedPeer(Peer):
    """A process that counts how often it is looked up, and how often what it has answered is looked at."""

    looks = 0

    def __hash__(self) -> int:
        CountedPeer.looks += 1
        return id(self)

    def __eq__(self, other: object) -> bool:
        CountedPeer.looks += 1
        return self is other

    def __getattribute__(self, name: str) -> Any:
        CountedPeer.looks += name == "report"
        return super().__getattribute__(name)


def test_the_work_of_asking_all_ranks_is_linear_in_their_number() -> None:
    """An answer wakes nobody but for the last, and is not looked for among all."""
    ranks = 256
    server = ControlServer("127.0.0.1", 30.0, print)
    pairs = [socket.socketpair() for _ in range(ranks)]
    with contextlib.ExitStack() as sockets:
        for rank, (ours, theirs) in enumerate(pairs):
            sockets.enter_context(ours)
            sockets.enter_context(theirs)
            server._peers[ours] = CountedPeer(rank, rank, "10.0.0.1")
        asking, found = in_thread(lambda: server.request_reports(60.0))
        for ours, theirs in reversed(pairs):
            assert decode_message(theirs.recv(100)) == REQUEST_STATUS
            assert asking.is_alive()
            server._handle_message(ours, StatusReport("in execute_model"))
        asking.join(60.0)
        server._peers.clear()
    server.close()
    assert found == [dict.fromkeys(range(ranks), "in execute_model")]
    assert CountedPeer.looks < 16 * ranks


@pytest.mark.parametrize(
    ("least_s", "ranks", "grace_s"), [(3, 2, 3), (3, 127, 3), (3, 1024, 11), (0, 1024, 0), (30, 4096, 62)]
)
def test_the_grace_of_a_shutdown_grows_with_the_ranks(least_s: float, ranks: int, grace_s: float) -> None:
    assert stop_grace_s(least_s, ranks) == grace_s


@given(st.floats(0, 3600), st.integers(1, 8192), st.integers(0, 8192))
def test_an_engine_core_has_more_time_than_its_workers_whatever_their_number(
    least_s: float, ranks: int, more: int
) -> None:
    assert engine_exit_s(least_s, ranks) >= stop_grace_s(least_s, ranks) + 10
    assert engine_exit_s(least_s, ranks + more) >= engine_exit_s(least_s, ranks)


@given(st.integers(0, 40))
def test_pipeline_pairs_are_connected_in_two_rounds(size: int) -> None:
    """Where each stage connects its pairs in their order, and a pair once both stages have come to it."""
    pairs = adjacent_stages(size)
    rounds = [0] * size
    for first, second in pairs:
        rounds[first] = rounds[second] = 1 + max(rounds[first], rounds[second])
    assert sorted(pairs) == [(stage, stage + 1) for stage in range(size - 1)]
    assert max(rounds, default=0) <= 2
