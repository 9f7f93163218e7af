"""The plan of data parallel ranks: what fits is placed well, what does not is refused with the setting that fits."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cluster.placement import (
    DpRequest,
    NodeNpus,
    Placed,
    RankPlacement,
    node_of_process,
    plan,
    plan_scale_up,
)
from vllm_ray_ascend.errors import PlacementError, ShortageError

pytestmark = pytest.mark.unit

MASTER, SECOND, THIRD = "10.77.0.1", "10.77.0.2", "10.77.0.3"
TWO = "10.77.0.1: 8 of 8, 10.77.0.2: 8 of 8"
MORE = "other engines, add nodes (`ray start --address=HEAD:PORT`)"


def cluster(*free: int, total: int = 8) -> list[NodeNpus]:
    return [NodeNpus(f"10.77.0.{number}", npus, total) for number, npus in enumerate(free, start=1)]


def request(dp_size: int, dp_size_local: int, world_size: int, **others: Any) -> DpRequest:
    return DpRequest(dp_size, dp_size_local, world_size, **{"master_address": MASTER, **others})


def refusal(asked: DpRequest, nodes: list[NodeNpus]) -> str:
    with pytest.raises(PlacementError) as raised:
        plan(asked, nodes)
    return str(raised.value)


def places(ranks: list[RankPlacement]) -> list[tuple[int, int, str]]:
    return [(rank.dp_rank, rank.local_dp_rank, rank.control_address) for rank in ranks]


def test_issue_2879_fits_two_ranks_a_node() -> None:
    ranks = plan(request(4, 2, 4), cluster(8, 8))
    assert places(ranks) == [(0, 0, MASTER), (1, 1, MASTER), (2, 0, SECOND), (3, 1, SECOND)]
    assert {rank.strategy for rank in ranks} == {"STRICT_PACK"}


def test_the_bundles_are_pinned_the_engine_actors_to_the_first_workers_node() -> None:
    assert RankPlacement(0, 0, (SECOND, THIRD)).bundles() == [
        {"NPU": 1.0, f"node:{SECOND}": 0.001},
        {"NPU": 1.0, f"node:{THIRD}": 0.001},
        {"CPU": 1.0, f"node:{SECOND}": 0.001},
    ]


def test_the_master_comes_first_wherever_it_is_listed() -> None:
    ranks = plan(request(3, 1, 4, master_address=THIRD), cluster(4, 4, 4))
    assert places(ranks) == [(0, 0, THIRD), (1, 0, MASTER), (2, 0, SECOND)]


def test_strict_leaves_out_a_node_with_too_few() -> None:
    assert places(plan(request(4, 2, 2), cluster(4, 3, 4)))[2:] == [(2, 0, THIRD), (3, 1, THIRD)]


def test_fill_takes_what_fits_of_the_others() -> None:
    ranks = plan(request(4, 1, 2, strategy="fill"), cluster(8, 3, 4))
    assert places(ranks) == [(0, 0, MASTER), (1, 0, SECOND), (2, 0, THIRD), (3, 1, THIRD)]


def test_span_takes_whole_nodes_and_skips_those_without() -> None:
    (rank,) = plan(request(1, 1, 4, strategy="span"), cluster(2, 0, 2, 2))
    assert rank.bundle_addresses == (MASTER, MASTER, THIRD, THIRD)
    assert (rank.control_address, rank.strategy) == (MASTER, "PACK")


def test_only_allowed_nodes_and_the_master_are_used() -> None:
    ranks = plan(request(2, 1, 4, allowed_addresses=frozenset({THIRD})), cluster(8, 8, 8))
    assert [rank.control_address for rank in ranks] == [MASTER, THIRD]


def test_the_message_of_issue_2879() -> None:
    assert refusal(request(4, 4, 4), cluster(8, 8)) == (
        "Cannot place 4 data parallel ranks of 4 NPUs, 4 on the master 10.77.0.1 (--data-parallel-size 4, "
        "--data-parallel-size-local 4, VLLM_RAY_DP_PACK_STRATEGY=strict). Free NPUs: 10.77.0.1: 8 of 8, "
        "10.77.0.2: 8 of 8. The master fits 2 ranks. The request fits with: --data-parallel-size-local 2"
    )


@pytest.mark.parametrize(
    ("asked", "free", "ending"),
    [
        (
            request(4, 4, 4),
            (12, 4),
            (
                "The master fits 3 ranks. The request fits with: VLLM_RAY_DP_PACK_STRATEGY=fill, "
                "--data-parallel-size-local 3"
            ),
        ),
        (
            request(3, 1, 4),
            (8, 8),
            "So the nodes fit 2 ranks. The request fits with: --data-parallel-size-local 2",
        ),
        (
            request(5, 5, 4),
            (8, 8),
            (
                f"The master fits 2 ranks. 4 NPUs more must be free: stop {MORE}, or: --data-parallel-size 4, "
                "--data-parallel-size-local 2"
            ),
        ),
        (
            request(5, 2, 4),
            (8, 8),
            f"So the nodes fit 4 ranks. 4 NPUs more must be free: stop {MORE}, or: --data-parallel-size 4",
        ),
        (
            request(2, 2, 1),
            (0, 0),
            (
                f"The master fits 0 ranks. 2 NPUs more must be free: stop {MORE}, or change the NPUs of a rank: "
                "--tensor-parallel-size, --pipeline-parallel-size"
            ),
        ),
        (
            request(2, 2, 8),
            (0, 8, 8),
            (
                "The master fits 0 ranks. The request fits with: `vllm serve` run on 10.77.0.2, "
                "--data-parallel-size-local 1"
            ),
        ),
        (
            request(2, 1, 8, allowed_addresses=frozenset({SECOND})),
            (8, 4, 8),
            (
                "So the nodes fit 1 rank. The request fits with: "
                "VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.2,10.77.0.3"
            ),
        ),
        (
            request(2, 1, 8, strategy="fill", all2all_backend="deepep_low_latency"),
            (8, 8),
            (
                "deepep_low_latency needs EP ranks 0 to 7, 8 to 15, ... on one node each, fill does not keep to that. "
                "The request fits with: VLLM_RAY_DP_PACK_STRATEGY=strict"
            ),
        ),
        (
            request(1, 1, 16),
            (8, 8),
            "The master fits 0 ranks. The request fits with: VLLM_RAY_DP_PACK_STRATEGY=span",
        ),
    ],
)
def test_messages_of_strict_and_fill(asked: DpRequest, free: tuple[int, ...], ending: str) -> None:
    nodes = ", ".join(f"10.77.0.{number}: {npus} of 8" for number, npus in enumerate(free, start=1))
    assert refusal(asked, cluster(*free)).partition(" Free NPUs: ")[2] == f"{nodes}. {ending}"


@pytest.mark.parametrize(
    ("asked", "free", "ending"),
    [
        (
            request(2, 1, 4),
            (8, 8),
            (
                "span is for ranks larger than a node, 4 NPUs fit one: use strict or fill. "
                "The request fits with: VLLM_RAY_DP_PACK_STRATEGY=strict"
            ),
        ),
        (
            request(1, 1, 16),
            (8, 4, 8),
            (
                "span needs equally many free NPUs on every node. "
                "The request fits with: VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.3"
            ),
        ),
        (
            request(1, 1, 12),
            (8, 8),
            (
                f"span takes whole nodes, and 12 is no multiple of 8. Stop {MORE}, or change the NPUs of a rank: "
                "--tensor-parallel-size, --pipeline-parallel-size"
            ),
        ),
        (
            request(2, 2, 16),
            (8, 8, 8, 8),
            "span counts one local rank only. The request fits with: --data-parallel-size-local 1",
        ),
        (
            request(2, 1, 16),
            (8, 8, 8),
            f"So the nodes fit 1 rank. 16 NPUs more must be free: stop {MORE}, or: --data-parallel-size 1",
        ),
        (
            request(1, 1, 16),
            (0, 8, 8),
            "The master has no free NPU. The request fits with: `vllm serve` run on 10.77.0.2",
        ),
    ],
)
def test_messages_of_span(asked: DpRequest, free: tuple[int, ...], ending: str) -> None:
    nodes = ", ".join(f"10.77.0.{number}: {npus} of 8" for number, npus in enumerate(free, start=1))
    message = refusal(replace(asked, strategy="span"), cluster(*free))
    assert message.partition(" Free NPUs: ")[2] == f"{nodes}. {ending}"


@pytest.mark.parametrize(
    ("asked", "nodes", "ending"),
    [
        (request(1, 1, 1), [], "none. The Ray cluster has no live node. Start one: `ray start --head`"),
        (
            request(1, 1, 1),
            cluster(0, 0, total=0),
            (
                "10.77.0.1: 0 of 0, 10.77.0.2: 0 of 0. No node declares an NPU. Load CANN's set_env.sh before "
                """`ray start`, or declare them: `ray start ... --resources='{"NPU": 8}'`"""
            ),
        ),
        (
            request(1, 1, 1, master_address="127.0.0.1"),
            cluster(8, 8),
            (
                f"{TWO}. The master 127.0.0.1 is no live node of the Ray cluster. Set "
                "--data-parallel-address or VLLM_HOST_IP to this node's address there, one of: 10.77.0.1,10.77.0.2"
            ),
        ),
        (
            request(1, 1, 1, allowed_addresses=frozenset({SECOND, "10.77.0.8", "10.77.0.9"})),
            cluster(8, 8),
            (
                f"{TWO}. VLLM_RAY_DP_PLACEMENT_NODE_IPS names 10.77.0.8, 10.77.0.9: no live "
                "node of the Ray cluster. Choose among: VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.2"
            ),
        ),
        (
            request(1, 1, 1, strategy="spread"),
            cluster(8),
            (
                "10.77.0.1: 8 of 8. VLLM_RAY_DP_PACK_STRATEGY knows strict, fill, span only. "
                "Unset it, or: VLLM_RAY_DP_PACK_STRATEGY=strict"
            ),
        ),
        (
            request(1, 1, 1),
            [*cluster(8), *cluster(8)],
            (
                "10.77.0.1: 8 of 8, 10.77.0.1: 8 of 8. An address has several Ray nodes, and ranks are pinned by "
                "address. Keep one there: `ray stop`, then one `ray start`"
            ),
        ),
    ],
)
def test_messages_that_no_other_placement_mends(asked: DpRequest, nodes: list[NodeNpus], ending: str) -> None:
    assert refusal(asked, nodes).partition(" Free NPUs: ")[2] == ending


def test_the_message_says_which_nodes_were_allowed() -> None:
    message = refusal(request(9, 1, 1, allowed_addresses=frozenset({SECOND, MASTER})), cluster(1, 1))
    assert "strict, VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.2). Free" in message


CURRENT = [Placed(0, 0, MASTER), Placed(1, 0, SECOND), Placed(2, 2, SECOND)]


def test_scale_up_numbers_ranks_by_the_engines_own_on_each_node() -> None:
    ranks = plan_scale_up(CURRENT, 7, 2, MASTER, [*cluster(0, 5, 2)[1:], NodeNpus(MASTER, 2, 8)])
    assert places(ranks) == [(3, 1, MASTER), (4, 1, SECOND), (5, 3, SECOND), (6, 0, THIRD)]
    assert all(set(rank.bundle_addresses) == {rank.control_address} for rank in ranks)
    assert {len(rank.bundle_addresses) for rank in ranks} == {2}


def test_scale_up_to_no_more_places_nothing() -> None:
    assert plan_scale_up(CURRENT, 3, 2, MASTER, cluster(0, 0)) == []


def test_scale_up_keeps_to_allowed_nodes() -> None:
    ranks = plan_scale_up(CURRENT, 4, 2, MASTER, cluster(0, 8, 8), {THIRD})
    assert places(ranks) == [(3, 0, THIRD)]


@pytest.mark.parametrize(
    ("free", "ending"),
    [
        (
            (2, 1),
            (
                "10.77.0.1: 2 of 8, 10.77.0.2: 1 of 8. The nodes fit 1 rank more. 4 NPUs more must be free: "
                f'stop {MORE}, or scale to: {{"new_data_parallel_size": 4}}'
            ),
        ),
        (
            (1, 1),
            f"10.77.0.1: 1 of 8, 10.77.0.2: 1 of 8. The nodes fit 0 ranks more. 6 NPUs more must be free: stop {MORE}",
        ),
    ],
)
def test_scale_up_that_does_not_fit(free: tuple[int, ...], ending: str) -> None:
    with pytest.raises(PlacementError) as raised:
        plan_scale_up(CURRENT, 6, 2, MASTER, cluster(*free))
    assert str(raised.value) == f"Cannot scale from 3 to 6 data parallel ranks of 2 NPUs. Free NPUs: {ending}"


def test_scale_up_without_the_master() -> None:
    with pytest.raises(PlacementError, match=r"The master 10\.9\.9\.9 is no live node"):
        plan_scale_up(CURRENT, 4, 2, "10.9.9.9", cluster(8, 8))


CLUSTERS = st.lists(st.integers(0, 8), min_size=1, max_size=5).map(lambda free: cluster(*free))


@st.composite
def requests(draw: st.DrawFn) -> tuple[DpRequest, list[NodeNpus]]:
    nodes = draw(CLUSTERS | st.tuples(st.integers(1, 5), st.integers(1, 4)).map(lambda it: cluster(*[it[1]] * it[0])))
    dp_size = draw(st.integers(1, 8))
    allowed = draw(st.frozensets(st.sampled_from([node.address for node in nodes])))
    asked = request(
        dp_size,
        draw(st.integers(0, dp_size)),
        draw(st.sampled_from([1, 2, 4, 8, 16])),
        strategy=draw(st.sampled_from(["strict", "fill", "span"])),
        allowed_addresses=allowed if draw(st.booleans()) else frozenset(),
        all2all_backend=draw(st.sampled_from(["", "deepep_low_latency"])),
    )
    return asked, nodes


def hold(ranks: list[RankPlacement], nodes: list[NodeNpus], taken: list[tuple[str, int]]) -> None:
    """No node gets more bundles than free NPUs, and local ranks are one owner's each on their node."""
    used = Counter(address for rank in ranks for address in rank.bundle_addresses)
    free = {node.address: node.free for node in nodes}
    assert all(number <= free[address] for address, number in used.items())
    local = [*taken, *((rank.control_address, rank.local_dp_rank) for rank in ranks)]
    assert len(set(local)) == len(local)


@given(requests())
def test_laws_of_a_plan(case: tuple[DpRequest, list[NodeNpus]]) -> None:
    asked, nodes = case
    try:
        ranks = plan(asked, nodes)
    except PlacementError:
        return
    assert [rank.dp_rank for rank in ranks] == list(range(asked.dp_size))
    assert {len(rank.bundle_addresses) for rank in ranks} == {asked.world_size}
    allowed = asked.allowed_addresses
    assert not allowed or {at for rank in ranks for at in rank.bundle_addresses} <= allowed | {MASTER}
    hold(ranks, nodes, [])


@given(requests())
def test_a_refusals_settings_make_it_fit(case: tuple[DpRequest, list[NodeNpus]]) -> None:
    asked, nodes = case
    try:
        plan(asked, nodes)
        return
    except PlacementError as error:
        message = str(error)
    settings = message.partition("The request fits with: ")[2] or message.partition(", or: ")[2]
    if settings:
        assert len(plan(changed(asked, settings), nodes)) == changed(asked, settings).dp_size
    else:
        assert message.endswith("change the NPUs of a rank: --tensor-parallel-size, --pipeline-parallel-size")


def changed(asked: DpRequest, settings: str) -> DpRequest:
    """The request with the settings that a message ends with, read as a user would."""

    def value(pattern: str) -> str | None:
        found = re.search(pattern, settings)
        return found and found.group(1)

    allowed = value(r"NODE_IPS=(\S+?)(?:, |$)")
    return replace(
        asked,
        dp_size=int(value(r"--data-parallel-size (\d+)") or asked.dp_size),
        dp_size_local=int(value(r"--data-parallel-size-local (\d+)") or asked.dp_size_local),
        strategy=value(r"PACK_STRATEGY=(\w+)") or asked.strategy,
        master_address=value(r"run on ([\d.]+\d)") or asked.master_address,
        allowed_addresses=frozenset(allowed.split(",")) if allowed else asked.allowed_addresses,
    )


@given(
    CLUSTERS,
    st.sets(st.tuples(st.sampled_from([MASTER, SECOND, THIRD]), st.integers(0, 4))),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_laws_of_scale_up(nodes: list[NodeNpus], taken: set[tuple[str, int]], more: int, world_size: int) -> None:
    current = [Placed(rank, local, address) for rank, (address, local) in enumerate(sorted(taken))]
    fits = sum(node.free // world_size for node in nodes)
    if more > fits:
        with pytest.raises(PlacementError, match=f"The nodes fit {fits} rank"):
            plan_scale_up(current, len(current) + more, world_size, MASTER, nodes)
        return
    ranks = plan_scale_up(current, len(current) + more, world_size, MASTER, nodes)
    assert [rank.dp_rank for rank in ranks] == list(range(len(current), len(current) + more))
    hold(ranks, nodes, sorted(taken))


def test_processes_of_an_moe_engine_meet_on_their_node() -> None:
    here = {"node:10.0.0.1": 0.001}
    assert node_of_process(0, 2, "127.0.0.1", "10.0.0.1", free=2) == here
    assert node_of_process(1, 2, "127.0.0.1", "10.0.0.1", free=2) == here
    assert node_of_process(0, 2, "10.0.0.1", "10.0.0.1", free=2) == here
    assert node_of_process(1, 2, "10.0.0.1", "10.0.0.1", free=0) == {}


def test_processes_of_an_moe_engine_that_do_not_fit_on_their_node() -> None:
    with pytest.raises(ShortageError) as raised:
        node_of_process(1, 4, "127.0.0.1", "10.0.0.1", free=3)
    assert str(raised.value) == (
        "Data parallel rank 1 of this MoE model needs 4 NPUs on this node (10.0.0.1), where 3 are free: with "
        "--data-parallel-backend mp the ranks meet at 127.0.0.1. Add --data-parallel-backend ray "
        "--data-parallel-size-local N, with N ranks on this node; the others may then be on other nodes."
    )
