"""Ranks that hand a queue's messages on within their node: real processes, real sockets, nodes that are simulated."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.relay_rank import Plan, digest
from tests.threads import in_thread
from vllm_ray_ascend.ipc import relay as relay_module
from vllm_ray_ascend.ipc.relay import Relay, RelayedReader, RelayingReader, open_reader, plan_relays
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ipc.tcp_queue import TcpQueueReader, TcpQueueWriter

pytestmark = pytest.mark.unit

HOST = "127.0.0.1"
LIMIT_S = 60.0
LARGE = 16_000_000
NODES = ([2, 3, 4], [5, 6], [7])
"""Ranks of the nodes beside the writer's."""


class Rank:
    """A process of `tests.relay_rank`."""

    def __init__(self, address: Address, relays: list[Relay], rank: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.relay_rank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._order(msgspec.json.encode(Plan(address, relays, rank)).decode())
        threading.Thread(target=self._read_lines, daemon=True).start()

    def start(self) -> None:
        """Have it read, once it has its end of the queue."""
        assert self.line() == "open"
        self._order("")

    def line(self, limit_s: float = LIMIT_S) -> str:
        """Return its next line. Raises queue.Empty."""
        return self._lines.get(timeout=limit_s).strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)


class Cluster:
    """A writer, and a process for each rank of ``nodes``."""

    def __init__(self, nodes: Sequence[Sequence[int]], limit_s: float | None, **options: int) -> None:
        self.relays = plan_relays(nodes, limit_s)
        self.writer = TcpQueueWriter(HOST, len(nodes), **options)
        self.ranks = {rank: Rank(self.writer.address, self.relays, rank) for node in nodes for rank in node}
        for rank in self.ranks.values():
            rank.start()
        for _ in nodes:
            self.writer.recv()

    def send(self, *parts: bytes) -> str:
        """Send a message; return what every rank prints of it."""
        self.writer.wait_for_space(LIMIT_S)
        self.writer.send_multipart(parts)
        return digest(list(parts))

    def exchange(self, *parts: bytes) -> None:
        """Send a message, and see that every rank has it next."""
        expected = self.send(*parts)
        assert {rank.line() for rank in self.ranks.values()} == {expected}

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.close()
        self.writer.close()


Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a Cluster."""
    started: list[Cluster] = []

    def start_cluster(nodes: Sequence[Sequence[int]] = NODES, limit_s: float | None = None, **options: int) -> Cluster:
        started.append(Cluster(nodes, limit_s, **options))
        return started[-1]

    yield start_cluster
    for cluster in started:
        cluster.close()


def named_segments(cluster: Cluster) -> list[str]:
    """Return the shared memory of the processes of a cluster that still has a name, and would outlive them."""
    maps = "".join(
        Path(f"/proc/{pid}/maps").read_text()
        for pid in (os.getpid(), *(rank.process.pid for rank in cluster.ranks.values()))
    )
    return [line for line in maps.splitlines() if "/dev/shm/" in line and not line.endswith("(deleted)")]


def test_a_node_of_one_rank_needs_no_relay_and_the_lowest_rank_is_the_first() -> None:
    relays = plan_relays([[9, 3, 4], [5], [7, 6]], 2.5)
    assert [(each.first, each.others, each.limit_s) for each in relays] == [(3, (4, 9), 2.5), (6, (7,), 2.5)]
    assert len({each.address.host for each in relays}) == len({each.address.token for each in relays}) == 2


def test_all_ranks_get_all_messages_in_order_over_one_connection_for_each_node(start: Start) -> None:
    cluster = start()
    large = os.urandom(LARGE)
    messages = [
        [b"READY"],
        [b"a" * 8192],
        [large],
        [b"", b"b" * 3, b"c" * 70_000, b""],
        *([b"%d" % number * 2000] for number in range(100)),
        [b"header", large, b"x" * 60_000, large[:1_000_000]],
        [b"d" * 65_500],  # beside its header, just more than a socket gets
        [b""] * 60_000,
        [b"end"],
    ]
    expected = [cluster.send(*parts) for parts in messages]
    for rank in cluster.ranks.values():
        assert [rank.line() for _ in messages] == expected
    assert len(cluster.writer._outbox._readers) == len(NODES)
    assert named_segments(cluster) == []
    names = Path("/proc/net/unix").read_text()
    assert {relay.first: names.count(relay.address.host) for relay in cluster.relays} == {2: 2, 5: 1}  # connections


def test_files_of_large_messages_are_closed_on_all_sides(start: Start) -> None:
    cluster = start([[1, 2, 3]])
    sizes = []
    for _ in range(3):
        for _ in range(10):
            cluster.exchange(os.urandom(200_000))
        sizes.append([rank.open_files() for rank in cluster.ranks.values()])
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_death_of_the_first_rank_is_named_by_the_others_and_noticed_by_the_writer(start: Start) -> None:
    cluster = start()
    cluster.exchange(b"x")
    cluster.ranks[2].signal(signal.SIGKILL)
    for rank in (3, 4):
        assert cluster.ranks[rank].line().startswith("ConnectionError: VRA-398: rank 2 of this node, which hands on")

    def send_on() -> None:
        while True:
            cluster.send(b"y")

    with pytest.raises(ConnectionError, match="VRA-501"):
        send_on()
    assert cluster.ranks[5].line() == cluster.ranks[6].line() == cluster.ranks[7].line() == digest([b"y"])


def test_a_first_rank_that_is_stopped_delays_no_other_node_and_is_noticed_by_the_writer(start: Start) -> None:
    cluster = start(max_pending_bytes=1000)
    cluster.exchange(b"x")
    cluster.ranks[2].signal(signal.SIGSTOP)
    expected = cluster.send(bytes(LARGE))
    assert [cluster.ranks[rank].line() for rank in (5, 6, 7)] == [expected] * 3
    with pytest.raises(TimeoutError, match=r"VRA-593: \d+ MiB wait for the reader at 127\.0\.0\.1"):
        cluster.writer.wait_for_space(0.5)
    cluster.ranks[2].signal(signal.SIGCONT)
    assert [cluster.ranks[rank].line() for rank in (2, 3, 4)] == [expected] * 3
    cluster.exchange(b"and on")


@pytest.mark.parametrize(("size", "count"), [(8192, 10), (LARGE, 3)], ids=["8 kB", "16 MB"])
def test_a_rank_that_is_stopped_delays_no_other_one_while_there_is_room(start: Start, size: int, count: int) -> None:
    cluster = start([[2, 3, 4], [5]])
    cluster.exchange(b"x")
    cluster.ranks[4].signal(signal.SIGSTOP)
    expected = [cluster.send(os.urandom(size)) for _ in range(count)]
    for rank in (2, 3, 5):
        assert [cluster.ranks[rank].line() for _ in range(count)] == expected
    cluster.ranks[4].signal(signal.SIGCONT)
    assert [cluster.ranks[4].line() for _ in range(count)] == expected


def test_a_rank_that_is_stopped_makes_the_writer_wait_and_misses_nothing(start: Start) -> None:
    cluster = start([[2, 3, 4], [5]], max_pending_bytes=1000)
    cluster.exchange(b"x")
    cluster.ranks[4].signal(signal.SIGSTOP)
    expected: list[str] = []

    def send_on() -> None:
        while True:
            cluster.writer.wait_for_space(1.0)
            message = os.urandom(60_000)
            cluster.writer.send(message)
            expected.append(digest([message]))

    with pytest.raises(TimeoutError, match="VRA-593"):
        send_on()
    assert [cluster.ranks[5].line() for _ in expected] == expected
    cluster.ranks[4].signal(signal.SIGCONT)
    for rank in (2, 3, 4):
        assert [cluster.ranks[rank].line() for _ in expected] == expected


def test_a_rank_that_makes_no_room_is_named_after_the_limit(start: Start) -> None:
    cluster = start([[2, 3, 4]], limit_s=1.0)
    message = os.urandom(30_000)
    cluster.exchange(message)
    cluster.ranks[4].signal(signal.SIGSTOP)
    for _ in range(100):
        cluster.send(message)
    last = ""
    while not last.startswith("TimeoutError"):
        last = cluster.ranks[2].line()
    assert "VRA-396: ranks [4] of this node have left no room for 1 s" in last


def test_the_death_of_another_rank_is_named_by_the_first_after_all_have_the_message(start: Start) -> None:
    cluster = start([[2, 3, 4]])
    cluster.exchange(b"x")
    cluster.ranks[3].signal(signal.SIGKILL)
    cluster.ranks[3].process.wait()
    expected = cluster.send(b"y")
    assert cluster.ranks[2].line().startswith("ConnectionError: VRA-397: rank 3 of this node")
    assert cluster.ranks[4].line() == expected


def open_node(ranks: Sequence[int] = (1, 2)) -> tuple[TcpQueueWriter, RelayingReader, list[RelayedReader]]:
    """Return the ends of a queue to one node, in this process."""
    writer, relays = TcpQueueWriter(HOST, 1), plan_relays([ranks])
    first, *others = (open_reader(writer.address, relays, rank) for rank in ranks)
    assert isinstance(first, RelayingReader)
    writer.recv()  # until it knows of the connection, a message would go to nobody
    return writer, first, [other for other in others if isinstance(other, RelayedReader)]


@pytest.mark.parametrize("closed", ["first", "other"])
def test_a_read_ends_when_its_own_end_is_closed(closed: str) -> None:
    writer, first, (other,) = open_node()
    writer.send(b"READY")
    ready = [in_thread(first.recv), in_thread(other.recv)]
    for thread, found in ready:
        thread.join(LIMIT_S)
        assert found == [b"READY"]
    end = first if closed == "first" else other
    thread, found = in_thread(end.recv_multipart)
    time.sleep(0.05)
    end.close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)
    with pytest.raises(ConnectionError):
        end.recv_multipart()


def test_a_first_rank_that_waits_for_the_others_to_connect_can_be_closed() -> None:
    writer, first, _ = open_node()
    writer.send(b"READY")
    assert not first.poll(20)
    thread, found = in_thread(first.recv)
    first.close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)


def test_a_first_rank_that_waits_for_room_names_the_ranks_and_can_be_closed() -> None:
    writer, first, (other,) = open_node()
    for _ in range(100):
        writer.send(bytes(30_000))

    def read() -> None:
        while True:
            first.recv_multipart()

    thread, found = in_thread(read)
    assert other.poll(LIMIT_S * 1000)
    deadline = time.monotonic() + LIMIT_S
    while first.late_readers() != [2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.late_readers() == [2]
    first.close()
    thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError)


def test_a_reader_leaves_a_bounded_number_of_bytes_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_UNREAD_BYTES", 1_000_000)
    writer, first, (other,) = open_node()
    for number in range(5):
        writer.send(b"%d" % number + bytes(400_000))
    got: list[bytes] = []
    thread, _ = in_thread(lambda: got.extend(first.recv()[:1] for _ in range(5)))
    assert other.recv()[:1] == b"0"
    thread.join(0.5)
    assert got == [b"0", b"1", b"2"][: len(got)] and first.late_readers() == [2]
    assert [other.recv()[:1] for _ in range(4)] == [b"1", b"2", b"3", b"4"]
    thread.join(LIMIT_S)
    assert got == [b"0", b"1", b"2", b"3", b"4"]


def test_another_process_without_the_token_is_no_rank() -> None:
    writer, first, (other,) = open_node()
    relay = other._relay
    stranger = RelayedReader(msgspec.structs.replace(relay, address=Address(relay.address.host, 0, "0" * 32)), 2)
    with pytest.raises(ConnectionError, match="VRA-590"):
        stranger._connect()
    writer.send(b"READY")
    ready = [in_thread(first.recv), in_thread(other.recv)]
    for thread, found in ready:
        thread.join(LIMIT_S)
        assert found == [b"READY"]


def test_a_rank_whose_first_rank_is_gone_before_it_connects() -> None:
    (relay,) = plan_relays([[1, 2]])
    with pytest.raises(ConnectionError, match="VRA-398: rank 1 of this node"):
        RelayedReader(relay, 2).recv()


def test_a_node_of_one_rank_reads_from_the_writer() -> None:
    writer = TcpQueueWriter(HOST, 1)
    assert isinstance(open_reader(writer.address, plan_relays([[1, 2], [3]]), 3), TcpQueueReader)
