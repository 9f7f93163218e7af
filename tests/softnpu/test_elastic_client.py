"""What the API server does about ranks that fail while an elastic engine is scaled, without engine cores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EEPNotificationType

from vllm_ray_ascend.engine import elastic_client
from vllm_ray_ascend.engine.elastic_client import (
    _closing_on_failure,
    _noting_changes,
    _RankLostError,
    _Scaling,
    _watched,
)
from vllm_ray_ascend.engine.manager import RankLoss
from vllm_ray_ascend.errors import ElasticEPError


class Manager:
    """What a client asks of the manager of engine cores."""

    def __init__(self) -> None:
        self.losses: list[RankLoss] = []
        self.calls: list[Any] = []
        self.local_engine_actors = ["a", "b"]

    def lost_in_scaling(self) -> list[RankLoss]:
        return self.losses

    def given_ranks(self) -> int:
        return 0

    def begin_commit(self) -> None:
        self.calls.append("begin")

    def end_commit(self, vllm_config: Any) -> None:
        self.calls.append("end")

    def scale_down_elastic_ep(self, present: int, size: int) -> None:
        self.calls.append((present, size))

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def make_client(present: int, size: int) -> Any:
    """Return a client in the middle of a scaling, before the commit."""

    class Client(SimpleNamespace):
        """One that is known by its identity, as upstream's."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    return Client(
        core_engines=list(range(present)),
        eep_scaling_cache=None,
        resources=SimpleNamespace(engine_manager=Manager(), engine_dead=False),
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size_local=present)),
        _vllm_ray_ascend_scaling=_Scaling(present, size, {}, {}),
    )


def scale_down(client: Any, *happens: Callable[[Any], None]) -> list[Any]:
    """Let a client of four ranks commit that there are two; the given things happen one after the other meanwhile.

    Return what its manager was asked to do.
    """

    async def commit(client: Any) -> None:
        client.eep_scaling_cache = SimpleNamespace(pending_notifications={})
        client.core_engines = client.core_engines[:2]
        for happen in happens:
            happen(client)
            await asyncio.sleep(1.0)

    asyncio.run(_closing_on_failure(commit)(client))
    calls: list[Any] = client.resources.engine_manager.calls
    return calls


def leave(rank: int) -> Callable[[Any], None]:
    """Let a rank say that it needs the others no more; upstream forgets the cache with the last of them."""

    def leave_engine(client: Any) -> None:
        left = client.eep_scaling_cache.pending_notifications.setdefault(EEPNotificationType.SHUTDOWN_COMPLETE, set())
        left.add(rank)
        if left == {2, 3}:
            client.resources.engine_manager.scale_down_elastic_ep(4, 2)
            client.eep_scaling_cache = None

    return leave_engine


def lose(rank: int) -> Callable[[Any], None]:
    return lambda client: client.resources.engine_manager.losses.append(RankLoss(rank, f"rank {rank} exited"))


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_client, "show_ranks", lambda *_: None)


def test_ranks_that_leave_are_waited_for() -> None:
    assert scale_down(make_client(4, 2), leave(2), lose(2), leave(3)) == ["begin", (4, 2), "end"]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_is_lost_in_the_commit_ends_all(rank: int) -> None:
    """One that leaves too: the others wait for its experts."""
    client = make_client(4, 2)
    with pytest.raises(ElasticEPError, match=f"VRA-347.*rank {rank} exited"):
        scale_down(client, leave(2), lose(rank))
    assert client.resources.engine_manager.calls == ["begin", "shutdown"]


def test_a_rank_that_is_lost_when_it_has_only_to_leave_gives_its_npus_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that never says that it leaves, such as one that is stopped."""
    client = make_client(4, 2)

    async def commit(client: Any) -> None:
        client.eep_scaling_cache = SimpleNamespace(pending_notifications={})
        leave(2)(client)
        lose(3)(client)

    asyncio.run(_closing_on_failure(commit)(client))
    assert client.resources.engine_manager.calls == ["begin", (4, 2), "end"]
    assert client.eep_scaling_cache is None and client.vllm_config.parallel_config.data_parallel_size_local == 2

    monkeypatch.setattr(elastic_client, "_LEAVE_S", 0.3)
    assert scale_down(make_client(4, 2), leave(2)) == ["begin", (4, 2), "end"]


def test_no_rank_joins_after_a_weight_update() -> None:
    async def call(client: Any, method: str) -> str:
        return method

    async def commit(client: Any) -> None:
        raise AssertionError("it is not reached")

    noting = _noting_changes(call)
    client = make_client(2, 4)
    assert asyncio.run(noting(client, "get_supported_tasks")) == "get_supported_tasks"
    assert not hasattr(client, "_vllm_ray_ascend_changed_by")
    asyncio.run(noting(client, "update_weights"))
    with pytest.raises(_RankLostError, match="update_weights"):  # one while the scaling was prepared
        asyncio.run(_closing_on_failure(commit)(client))
    client = make_client(2, 4)
    asyncio.run(noting(client, "update_weights"))
    with pytest.raises(ElasticEPError, match="VRA-169"):
        asyncio.run(_watched(commit)(client, 4))
