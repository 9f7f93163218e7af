"""Engine cores that drain, and that are placed again while the server stops, without Ray."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.cluster.dp_placement import RankPlacement
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.engine import manager, rank_actors, rank_recovery
from vllm_ray_ascend.engine.actors import NodeLocalEngineCore
from vllm_ray_ascend.engine.manager import RayAscendEngineActorManager
from vllm_ray_ascend.engine.rank_actors import ReplaceableActors
from vllm_ray_ascend.engine.rank_recovery import RankRecovery, drain_message
from vllm_ray_ascend.engine.rank_status import StatusPublisher
from vllm_ray_ascend.errors import ShortageError


def test_requests_that_outlast_a_drain_do_not_keep_the_engine_core(monkeypatch: pytest.MonkeyPatch) -> None:
    exited = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: exited.set())
    core = object.__new__(NodeLocalEngineCore)
    vars(core).update(vllm_config=SimpleNamespace(shutdown_timeout=0), shutdown_state=None, input_queue=queue.Queue())
    core._handle_extension(drain_message(1).name)
    assert core.vllm_config.shutdown_timeout == 1  # type: ignore[attr-defined]
    assert exited.wait(30)


def test_no_group_is_left_where_the_server_stops_while_a_rank_is_placed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = object.__new__(ReplaceableActors)
    removed: list[str] = []
    actors.placements = [RankPlacement(0, 0, ("gone",), ("gone",))]
    actors.__dict__.update(
        manager_stopped=threading.Event(),
        created_placement_groups=["old"],
        addresses=SimpleNamespace(outputs=["tcp://127.0.0.1:1"]),
        _config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=1, tensor_parallel_size=1)),
        _kind=NPU,
        _placing=threading.Lock(),
    )

    def create(*_: Any) -> list[str]:
        actors.manager_stopped.set()
        return ["new"]

    replaced = {
        "current_nodes": lambda kind: [],
        "free_npus_per_node": lambda kind, demand: [],
        "node_id": lambda: "here",
        "allowed_addresses": frozenset,
        "plan_replacement": lambda *_: RankPlacement(0, 0, ("here",), ("here",)),
        "wanted_groups": lambda *_: [],
        "create_placement_groups": create,
        "remove_placement_groups": removed.extend,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(rank_actors, name, function)
    actors._ensure_group(0)
    assert removed == ["old", "new"]


def test_a_rank_whose_new_engine_core_starts_just_now_is_not_watched() -> None:
    ranks = object.__new__(RayAscendEngineActorManager)
    stopped = threading.Event()
    stopped.set()  # so that nothing is waited for
    ranks.__dict__.update(
        placement_group_is_local=[True],
        local_engine_actors=["new"],
        actor_run_ref_dict={},
        manager_stopped=stopped,
        _ranks_lock=threading.RLock(),
    )
    publisher = StatusPublisher(SimpleNamespace(outputs=[], coordinator_output=None))
    ranks._watch_ranks(RankRecovery([[0]], list, publisher))


def test_ranks_leave_a_node_that_drains_only_while_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on one node serves until the node is gone."""
    drained: list[int] = []
    stopped = threading.Event()
    stopped.set()  # so that nothing is waited for
    ranks = object.__new__(RayAscendEngineActorManager)
    ranks.__dict__.update(
        placement_group_is_local=[True, False],
        placements=[RankPlacement(0, 0, ("a",), ("a",)), RankPlacement(1, 0, ("b",), ("b",))],
        manager_stopped=stopped,
        _ranks_lock=threading.RLock(),
        _server=SimpleNamespace(send=lambda rank, message: drained.append(rank)),
    )
    publisher = StatusPublisher(SimpleNamespace(outputs=[], coordinator_output=None))
    recovery = RankRecovery([[0], [1]], list, publisher)
    for draining, expected in (({"a": 0, "b": 0}, []), ({"b": 0}, [1])):
        monkeypatch.setattr(manager, "draining_nodes", lambda draining=draining: draining)
        assert sorted(ranks._drain_ranks(recovery, set())) == drained == expected
    assert ranks._drain_ranks(recovery, {1}) == {1} and drained == [1]
    together = RankRecovery([[0, 1]], list, publisher)
    assert ranks._drain_ranks(together, set()) == set() and drained == [1]
    recovery.changed_by = "update_weights"
    assert ranks._drain_ranks(recovery, set()) == set() and drained == [1], "a new engine core would lack the weights"


def test_ranks_of_which_none_serves_wait_for_the_npus_of_a_node_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As workers do, for VLLM_RAY_ASCEND_WORKER_LIMIT_S; what is wrong otherwise ends them after three attempts."""
    monkeypatch.setattr(rank_recovery, "restart_delay_s", lambda *_: 0.0)
    publisher = StatusPublisher(SimpleNamespace(outputs=[], coordinator_output=None))
    serve = threading.Event()
    attempts: list[Exception] = [*(ShortageError("VRA-154", "no room") for _ in range(7))]

    def restart(ranks: Sequence[int]) -> Sequence[int]:
        if attempts:
            raise attempts.pop()
        serve.set()
        return ranks

    waiting = RankRecovery([[0, 1]], restart, publisher)
    waiting.lose(1, "its node is gone")
    assert serve.wait(30) and not waiting.ended.is_set()

    attempts[:] = [RuntimeError("no model") for _ in range(7)]
    failing = RankRecovery([[0, 1]], restart, publisher)
    failing.lose(1, "its node is gone")
    assert failing.ended.wait(30) and len(attempts) == 4

    monkeypatch.setenv("VLLM_RAY_ASCEND_WORKER_LIMIT_S", "0.001")
    attempts[:] = [ShortageError("VRA-154", "no room") for _ in range(7)]
    late = RankRecovery([[0, 1]], restart, publisher)
    late.lose(1, "its node is gone")
    assert late.ended.wait(30), "the time in which they are waited for is over"


def test_upstream_takes_the_new_engine_cores_of_a_list_that_got_none() -> None:
    """It takes the last n of each list, n being 0 for one of them: all of it, for which it waits without end."""
    remote = manager.AppendedSlices(["old"])
    assert remote[-0:] == [] and remote[0] == "old" and [*remote] == ["old"]
    remote.append("new")
    assert remote[-1:] == remote[-0:] == ["new"] and len(remote) == 2


def elastic_ranks(lost: Collection[int], redundant: int = 8) -> ReplaceableActors:
    """Return four ranks of a model of 8 experts, of which those ``lost`` can be placed nowhere."""
    ranks = object.__new__(ReplaceableActors)

    def ensure_group(rank: int) -> None:
        if rank in lost:
            raise ShortageError("VRA-154", f"no room for rank {rank}")

    config = SimpleNamespace(
        enable_elastic_ep=True,
        eplb_config=SimpleNamespace(num_redundant_experts=redundant),
        data_parallel_size=4,
    )
    ranks.__dict__.update(
        placement_group_is_local=[True, True, False, False],
        local_engine_actors=["a", "b"],
        remote_engine_actors=["c", "d"],
        created_placement_groups=["ga", "gb", "gc", "gd"],
        placements=[RankPlacement(rank, rank % 2, ("n",)) for rank in range(4)],
        actor_run_ref_dict={actor: f"run {actor}" for actor in "abcd"},
        run_refs=[f"run {actor}" for actor in "abcd"],
        _config=SimpleNamespace(parallel_config=config, model_config=SimpleNamespace(get_num_experts=lambda: 8)),
        _placing=threading.Lock(),
        _ranks_lock=threading.RLock(),
        _ensure_group=ensure_group,
    )
    return ranks


def test_elastic_ranks_without_npus_are_left_out_and_the_others_are_numbered() -> None:
    ranks = elastic_ranks(lost={1, 2})
    with pytest.raises(ShortageError):  # NPUs may be about to come free
        ranks._ensure_groups([0, 1, 2, 3])
    assert ranks._ensure_groups([0, 1, 2, 3]) == [0, 1]
    assert [ranks.actor(rank) for rank in (0, 1)] == ["a", "d"]
    assert ranks.created_placement_groups == ["ga", "gd"] and ranks.run_refs == ["run a", "run d"]
    assert [(each.dp_rank, each.local_dp_rank) for each in ranks.placements] == [(0, 0), (1, 1)]
    config = ranks._config.parallel_config
    assert (config.data_parallel_size, config.data_parallel_size_local) == (2, 1)
    assert config.eplb_config.num_redundant_experts == 0  # 16 of 8 on four ranks, 8 of 8 on two


@pytest.mark.parametrize(
    ("lost", "redundant"),
    [
        ({0}, 8),  # the others meet at its node
        ({1, 2, 3}, 24),  # one rank is no elastic engine
        ({1, 2}, 4),  # two ranks have room for six experts
    ],
)
def test_too_few_elastic_ranks_wait_for_npus(lost: set[int], redundant: int) -> None:
    ranks = elastic_ranks(lost, redundant)
    for _ in range(2):
        with pytest.raises(ShortageError, match=f"no room for rank {min(lost)}"):
            ranks._ensure_groups([0, 1, 2, 3])
    assert len(ranks.created_placement_groups) == 4


def test_ranks_that_are_not_elastic_wait_for_npus() -> None:
    ranks = elastic_ranks(lost={3})
    ranks._config.parallel_config.enable_elastic_ep = False
    for _ in range(2):
        with pytest.raises(ShortageError):
            ranks._ensure_groups([0, 1, 2, 3])
