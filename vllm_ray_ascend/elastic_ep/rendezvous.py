"""How ranks that join meet those that serve: nobody waits in a rendezvous for a process that may never come.

A rendezvous of gloo or HCCL cannot be ended, and its limits are many minutes. So a rank that joins announces that it
is about to enter one, and the others, which can stop waiting for that, enter it then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Literal

from torch.distributed import TCPStore

from vllm_ray_ascend.errors import ElasticEPError

Place = Literal["cores", "workers"]
"""Where ranks meet: engine cores in the data parallel group, by data parallel rank; workers in all groups that change,
by rank over all engines."""

_POLL_S = 0.1


def announce(host: str, port: int, place: Place, rank: int) -> None:
    """Report that ``rank``, which joins, is about to enter a rendezvous. ``host``, ``port``: the scaling's store."""
    _connect(host, port).set(_key(place, rank), b"1")


def wait_for_announcements(host: str, port: int, place: Place, ranks: Iterable[int], ended: threading.Event) -> None:
    """Wait until all of ``ranks`` are about to enter a rendezvous. Raises ElasticEPError once ``ended`` is set."""
    keys = [_key(place, rank) for rank in ranks]
    store = _connect(host, port) if keys else None
    while store is not None and not store.check(keys):
        if ended.wait(_POLL_S):
            raise ElasticEPError("VRA-340", f"the scaling was rolled back before these {place} came: {', '.join(keys)}")


def report_failure(host: str, port: int, rank: int, error: BaseException) -> None:
    """Report to whoever has ordered the scaling that data parallel rank ``rank`` cannot prepare it, and why."""
    _connect(host, port).set(_failure_key(rank), f"{type(error).__name__}: {error}".encode())


class FailureReports:
    """The reports of `report_failure`, for whoever has ordered the scaling."""

    def __init__(self, host: str, port: int) -> None:
        self._store = _connect(host, port)

    def first(self, ranks: Iterable[int]) -> str:
        """Return the first report of ``ranks``; empty where there is none."""
        for rank in ranks:
            if self._store.check([_failure_key(rank)]):
                return f"data parallel rank {rank}: {self._store.get(_failure_key(rank)).decode()}"
        return ""

    def release(self, keys: Iterable[str]) -> None:
        """End whatever waits for ``keys`` of the store."""
        for key in keys:
            self._store.set(key, b"0")


def _connect(host: str, port: int) -> TCPStore:
    """Return a connection of one's own: a wait of another thread would block a shared one."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False)


def _key(place: Place, rank: int) -> str:
    return f"vllm_ray_ascend/{place}/{rank}"


def _failure_key(rank: int) -> str:
    return f"vllm_ray_ascend/failed/{rank}"
