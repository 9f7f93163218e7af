"""Lost data parallel ranks: which are restarted together, when, and where. What servers learn: tests/softnpu."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ray_ascend.cluster.dp_placement import NodeNpus, PlacedRank, plan_replacement
from vllm_ray_ascend.engine.rank_recovery import (
    drain_limit_s,
    drain_message,
    drain_seconds,
    failure_domains,
    may_restart_ranks,
    restart_delay_s,
)
from vllm_ray_ascend.errors import ShortageError

pytestmark = pytest.mark.unit


def config(size: int = 2, moe: bool = False, local_only: bool = False, elastic: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=size, local_engines_only=local_only, enable_elastic_ep=elastic
        ),
        model_config=SimpleNamespace(is_moe=moe),
    )


def test_ranks_that_step_together_are_one_failure_domain() -> None:
    assert failure_domains(config(3)) == [[0], [1], [2]]
    assert failure_domains(config(3, moe=True)) == [[0, 1, 2]]


def test_ranks_are_restarted_only_on_request_and_where_one_manager_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not may_restart_ranks(config())
    monkeypatch.setenv("VLLM_RAY_ASCEND_RECOVER", "1")
    assert may_restart_ranks(config()) and may_restart_ranks(config(moe=True))
    assert may_restart_ranks(config(moe=True, elastic=True))
    assert not any(map(may_restart_ranks, (config(1), config(local_only=True))))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert not may_restart_ranks(config())


@pytest.mark.parametrize(
    ("starts", "delay"),
    [([], 0), ([1000], 0), ([0, 1000], 0), ([900, 1000], 2), ([800, 900, 1000], 4), ([*range(990, 1000)], 60)],
)
def test_delays_grow_while_a_rank_flaps(starts: list[float], delay: float) -> None:
    assert restart_delay_s(starts, 1000) == delay


def test_what_drains_is_given_the_time_that_its_node_has() -> None:
    assert drain_limit_s(0, 1000.0) == 120
    assert drain_limit_s(1_100_000, 1000.0) == 90
    assert drain_limit_s(1_001_000, 1000.0) == 1
    assert drain_seconds(drain_message(90).name) == 90
    assert drain_seconds("relay") == 0


def test_a_replacement_is_whole_and_takes_a_free_local_rank() -> None:
    nodes = [NodeNpus("a", 0, 2, node_id="A"), NodeNpus("b", 3, 4, node_id="B")]
    others = [PlacedRank(0, 0, "A"), PlacedRank(2, 0, "B")]
    placed = plan_replacement(1, others, 2, "A", nodes, {"b", "gone"})
    assert (placed.dp_rank, placed.local_dp_rank, placed.node_ids) == (1, 1, ("B", "B"))
    crowd = [PlacedRank(rank, rank - 2, "B") for rank in (2, 3, 4)]
    assert plan_replacement(1, crowd, 1, "A", nodes).local_dp_rank == 1  # vLLM refuses one above the rank's own
    with pytest.raises(ShortageError, match="data parallel rank 1 of 4 NPUs on other nodes"):
        plan_replacement(1, others, 4, "A", nodes)
    with pytest.raises(ShortageError):
        plan_replacement(1, others, 2, "A", nodes, {"gone"})


def test_a_rank_larger_than_a_node_is_placed_again_across_nodes() -> None:
    """With its tensor parallel groups whole where possible (--data-parallel-placement span)."""
    nodes = [NodeNpus("a", 0, 2, node_id="A"), NodeNpus("b", 2, 2, node_id="B"), NodeNpus("c", 2, 2, node_id="C")]
    placed = plan_replacement(1, [PlacedRank(0, 0, "A")], 4, "A", nodes, group_size=2)
    assert placed.node_ids == ("B", "B", "C", "C") and placed.local_dp_rank == 0 and placed.strategy == "PACK"
    with pytest.raises(ShortageError, match="No node has room for it"):
        plan_replacement(1, [PlacedRank(0, 0, "A")], 6, "A", nodes, group_size=2)
