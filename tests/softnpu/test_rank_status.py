"""What API servers and the coordinator learn of data parallel ranks that are lost and restarted, on real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder

from vllm_ray_ascend.engine.rank_recovery import RankRecovery
from vllm_ray_ascend.engine.rank_status import RANK_DOWN, RANK_UP, RankStatus, StatusPublisher

LIMIT_MS = 30_000


class Listener:
    """An API server's and the coordinator's sockets, and what arrived."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.server, self.coordinator = self._context.socket(zmq.PULL), self._context.socket(zmq.PULL)
        for socket in (self.server, self.coordinator):
            socket.bind("tcp://127.0.0.1:0")
        self.addresses = SimpleNamespace(
            outputs=[self.server.getsockopt_string(zmq.LAST_ENDPOINT)],
            coordinator_output=self.coordinator.getsockopt_string(zmq.LAST_ENDPOINT),
        )

    def close(self) -> None:
        self._context.destroy(0)

    def next_status(self) -> tuple[str, int, dict[str, Any]]:
        outputs = self._receive(self.server)
        kind, status = outputs.utility_output.result.result
        return kind, status["rank"], status

    def next_reset(self) -> Any:
        return self._receive(self.coordinator)

    def _receive(self, socket: zmq.Socket[bytes]) -> Any:
        assert socket.poll(LIMIT_MS)
        return MsgpackDecoder(EngineCoreOutputs).decode(socket.recv_multipart())


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


class Cluster:
    """Counts restarts, of which the first ``failures`` fail."""

    def __init__(self, listener: Listener, domains: Sequence[Sequence[int]], failures: int = 0) -> None:
        self.publisher = StatusPublisher(listener.addresses)
        self.recovery = RankRecovery(domains, self.restart, self.publisher)
        self.restarted: list[tuple[int, ...]] = []
        self.may_restart = threading.Event()
        self.may_restart.set()
        self._failures = failures
        self.gone: set[int] = set()
        """Ranks that are left out."""

    def restart(self, ranks: Sequence[int]) -> Sequence[int]:
        self.may_restart.wait(LIMIT_MS)
        self.restarted.append(tuple(ranks))
        if len(self.restarted) <= self._failures:
            raise OSError("no room")
        return [rank for rank in ranks if rank not in self.gone]


def test_a_lost_rank_is_down_until_it_is_restarted(listener: Listener) -> None:
    cluster = Cluster(listener, [[0], [1]], failures=1)
    cluster.may_restart.clear()
    cluster.recovery.lose(1, "it was killed")
    cluster.recovery.lose(1, "again")  # Ray reports what the control connection has reported before
    kind, rank, status = listener.next_status()
    assert (kind, rank, status["cause"], status["requests_lost"]) == (RANK_DOWN, 1, "it was killed", True)
    reset = listener.next_reset()
    assert (reset.engine_index, reset.scheduler_stats.num_running_reqs) == (1, 0)
    assert 0 < reset.wave_complete < 1 << 31
    assert cluster.recovery.down() == {1}
    cluster.may_restart.set()
    kind, rank, status = listener.next_status()
    assert (kind, rank, status["is_new"]) == (RANK_UP, 1, True)
    assert cluster.restarted == [(1,), (1,)] and cluster.recovery.down() == set()
    cluster.publisher.close()


def test_ranks_of_one_domain_are_restarted_together(listener: Listener) -> None:
    cluster = Cluster(listener, [[0, 1]])
    cluster.recovery.lose(1, "it was killed")
    statuses = [listener.next_status()[:2] for _ in range(4)]
    assert statuses == [(RANK_DOWN, 0), (RANK_DOWN, 1), (RANK_UP, 0), (RANK_UP, 1)]
    assert cluster.restarted == [(0, 1)]
    cluster.publisher.close()


def test_ranks_that_are_left_out_do_not_come_back(listener: Listener) -> None:
    cluster = Cluster(listener, [[0, 1, 2]])
    cluster.gone = {2}
    cluster.recovery.lose(2, "its node is gone")
    assert [listener.next_status()[:2] for _ in range(5)][3:] == [(RANK_UP, 0), (RANK_UP, 1)]
    assert cluster.recovery.down() == set() and cluster.recovery.domain(1) == (0, 1)
    assert cluster.recovery.domain(2) == ()
    cluster.publisher.close()


def test_ranks_that_are_about_to_join_are_not_restarted_until_they_have(listener: Listener) -> None:
    cluster = Cluster(listener, [[0, 1]])
    cluster.recovery.lose(2, "it was killed")
    assert cluster.recovery.down() == set()
    cluster.recovery.set_domains([[0, 1, 2]])
    cluster.recovery.lose(2, "it was killed")
    assert [listener.next_status()[:2] for _ in range(6)][3:] == [(RANK_UP, rank) for rank in range(3)]
    assert cluster.restarted == [(0, 1, 2)]
    cluster.publisher.close()


def test_all_end_where_none_serves_and_none_can_be_started(listener: Listener) -> None:
    cluster = Cluster(listener, [[0, 1]], failures=100)
    cluster.recovery.lose(0, "it was killed")
    assert cluster.recovery.ended.wait(LIMIT_MS / 1000)
    assert cluster.recovery.cause == "it was killed" and len(cluster.restarted) == 3
    cluster.publisher.close()


def test_none_ends_while_the_last_rank_that_was_lost_is_being_started(listener: Listener) -> None:
    cluster = Cluster(listener, [[0], [1]])
    recovery = cluster.recovery
    recovery._down = {1}
    assert not any(recovery._nothing_can_be_started((1,)) for _ in range(9))  # rank 0 serves
    recovery._down = {0, 1}
    assert not any(recovery._nothing_can_be_started((1,)) for _ in range(9))
    assert [recovery._nothing_can_be_started((0,)) for _ in range(3)] == [False, False, True]
    cluster.publisher.close()


def test_a_closed_publisher_opens_no_sockets(listener: Listener) -> None:
    publisher = StatusPublisher(listener.addresses)
    publisher.close()
    publisher.publish(RANK_UP, RankStatus(1))
    assert not publisher._sockets


def test_all_end_where_a_new_rank_would_lack_what_a_call_changed(listener: Listener) -> None:
    cluster = Cluster(listener, [[0], [1]])
    cluster.recovery.changed_by = "update_weights"
    cluster.recovery.lose(0, "it was killed")
    assert cluster.recovery.ended.is_set() and cluster.restarted == []
    cluster.publisher.close()


def test_nothing_is_restarted_once_the_server_stops(listener: Listener) -> None:
    cluster = Cluster(listener, [[0], [1]])
    cluster.recovery.stop()
    cluster.recovery.lose(0, "it was stopped")
    assert cluster.recovery.down() == set() and cluster.restarted == []
    cluster.publisher.close()
