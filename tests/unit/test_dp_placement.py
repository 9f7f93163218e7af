"""The placement of data parallel ranks: what fits is placed, what does not is an error with the setting that fits."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cluster.dp_placement import (
    DpRequest,
    NodeNpus,
    PlacedRank,
    RankPlacement,
    fit_local_size,
    growth_demand,
    is_tied_by_mp_backend,
    placed_ranks,
    plan_placement,
    plan_scale_up,
)
from vllm_ray_ascend.cluster.placement_groups import PlacementGroupSpec, pin_to_nodes
from vllm_ray_ascend.cluster.rank_placement import place_groups, straddling_groups
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.errors import PlacementError, ShortageError

pytestmark = pytest.mark.unit

MASTER, SECOND, THIRD = "10.77.0.1", "10.77.0.2", "10.77.0.3"
TWO = "10.77.0.1: 8 of 8, 10.77.0.2: 8 of 8"
MORE = "other engines, add nodes (`ray start --address=HEAD:PORT`)"


def cluster(*free: int, total: int = 8) -> list[NodeNpus]:
    return [NodeNpus(f"10.77.0.{number}", npus, total) for number, npus in enumerate(free, start=1)]


def request(dp_size: int, dp_size_local: int, world_size: int, **others: Any) -> DpRequest:
    return DpRequest(dp_size, dp_size_local, world_size, **{"master_address": MASTER, **others})


def error_text(asked: DpRequest, nodes: list[NodeNpus]) -> str:
    with pytest.raises(PlacementError) as raised:
        plan_placement(asked, nodes)
    return str(raised.value)


def places(ranks: list[RankPlacement]) -> list[tuple[int, int, str]]:
    return [(rank.dp_rank, rank.local_dp_rank, rank.bundle_addresses[0]) for rank in ranks]


def test_issue_2879_fits_two_ranks_a_node() -> None:
    ranks = plan_placement(request(4, 2, 4), cluster(8, 8))
    assert places(ranks) == [(0, 0, MASTER), (1, 1, MASTER), (2, 0, SECOND), (3, 1, SECOND)]
    assert {rank.strategy for rank in ranks} == {"STRICT_PACK"}


def test_each_bundle_is_pinned_once_the_engine_actors_to_the_first_workers_node() -> None:
    placement = RankPlacement(0, 0, (SECOND, THIRD), ("second", "third"))
    assert placement.bundles() == [{"NPU": 1.0}, {"NPU": 1.0}, {"CPU": 1.0}]
    nodes = [NodeResources(address, 8, 0, node_id=key) for address, key in ((SECOND, "second"), (THIRD, "third"))]
    spec = PlacementGroupSpec("engine", placement.bundles(), placement.strategy)
    assert pin_to_nodes(spec, placement.pins, nodes).bundles == [
        {"NPU": 1.0, f"node:{SECOND}": 0.001},
        {"NPU": 1.0, f"node:{THIRD}": 0.001},
        {"CPU": 1.0, f"node:{SECOND}": 0.001},
    ]


def test_the_master_comes_first_wherever_it_is_listed() -> None:
    ranks = plan_placement(request(3, 1, 4, master_address=THIRD), cluster(4, 4, 4))
    assert places(ranks) == [(0, 0, THIRD), (1, 0, MASTER), (2, 0, SECOND)]


def test_strict_leaves_out_a_node_with_too_few() -> None:
    assert places(plan_placement(request(4, 2, 2), cluster(4, 3, 4)))[2:] == [(2, 0, THIRD), (3, 1, THIRD)]


def test_fill_takes_what_fits_of_the_others() -> None:
    ranks = plan_placement(request(4, 1, 2, strategy="fill"), cluster(8, 3, 4))
    assert places(ranks) == [(0, 0, MASTER), (1, 0, SECOND), (2, 0, THIRD), (3, 1, THIRD)]


def test_span_takes_whole_nodes_and_skips_those_without() -> None:
    (rank,) = plan_placement(request(1, 1, 4, strategy="span"), cluster(2, 0, 2, 2))
    assert rank.bundle_addresses == (MASTER, MASTER, THIRD, THIRD)
    assert (rank.bundle_addresses[0], rank.strategy) == (MASTER, "PACK")


def test_only_allowed_nodes_and_the_master_are_used() -> None:
    ranks = plan_placement(request(2, 1, 4, allowed_addresses=frozenset({THIRD})), cluster(8, 8, 8))
    assert [rank.bundle_addresses[0] for rank in ranks] == [MASTER, THIRD]


def test_the_message_of_issue_2879() -> None:
    assert error_text(request(4, 4, 4), cluster(8, 8)) == (
        "VRA-229: Cannot place 4 data parallel ranks of 4 NPUs, 4 on the master 10.77.0.1 (--data-parallel-size 4, "
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
                "deepep_low_latency needs EP ranks 0 to 7, 8 to 15, ... on one node each, which fill does not "
                "guarantee. The request fits with: VLLM_RAY_DP_PACK_STRATEGY=strict"
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
    assert error_text(asked, cluster(*free)).partition(" Free NPUs: ")[2] == f"{nodes}. {ending}"


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
    message = error_text(replace(asked, strategy="span"), cluster(*free))
    assert message.partition(" Free NPUs: ")[2] == f"{nodes}. {ending}"


@pytest.mark.parametrize(
    ("group_size", "dp_size", "world_size", "free", "expected"),
    [
        (1, 1, 16, (8, 4, 8), ["1111111133333333"]),  # nodes of different sizes: the fewest
        (4, 1, 12, (8, 8), ["111111112222"]),  # not a multiple of a node
        (2, 1, 6, (3, 3), ["111222"]),  # vLLM's plan, as no other has fewer groups that straddle
        (2, 1, 6, (3, 3, 3), ["112233"]),  # whole groups, where vLLM's plan has one that straddles
        (2, 2, 4, (3, 3, 3, 3), ["1122", "3344"]),
        (2, 2, 4, (1, 3, 3, 3), []),  # no group fits whole on the master, where rank 0 listens
        (2, 2, 6, (5, 4, 4), ["111122", "223333"]),
    ],
)
def test_span_keeps_tensor_parallel_groups_whole(
    group_size: int, dp_size: int, world_size: int, free: tuple[int, ...], expected: list[str]
) -> None:
    asked = replace(request(dp_size, 1, world_size), strategy="span", group_size=group_size)
    if not expected:
        assert "VRA-229" in error_text(asked, cluster(*free))
        return
    ranks = plan_placement(asked, cluster(*free))
    assert ["".join(address[-1] for address in rank.bundle_addresses) for rank in ranks] == expected
    assert [rank.local_dp_rank for rank in ranks] == [0] * dp_size


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_span_is_the_best_that_the_free_npus_allow(group_size: int, stages: int, dp_size: int, free: list[int]) -> None:
    """No NPU is given twice, rank 0 begins on the master, and no more groups straddle than one engine of all had."""
    asked = replace(request(dp_size, 1, group_size * stages), strategy="span", group_size=group_size)
    try:
        ranks = plan_placement(asked, cluster(*free))
    except PlacementError:
        return
    used = Counter(address for rank in ranks for address in rank.bundle_addresses)
    assert all(used[node.address] <= node.free for node in cluster(*free))
    assert ranks[0].bundle_addresses[0] == MASTER
    assert len({(rank.bundle_addresses[0], rank.local_dp_rank) for rank in ranks}) == dp_size
    together = place_groups({node.address: node.free for node in cluster(*free)}, group_size, stages * dp_size)
    straddling = sum(len(straddling_groups(rank.bundle_addresses, group_size)) for rank in ranks)
    assert straddling == len(straddling_groups(together, group_size))


@pytest.mark.parametrize(
    ("asked", "free", "expected"),
    [
        (request(4, 2, 2), (4,), [(4, 2, "STRICT_PACK")] * 2),
        (replace(request(3, 1, 2), strategy="fill"), (2,), [(2, 1, "STRICT_PACK")] * 3),
        (replace(request(2, 1, 8), strategy="span"), (4,), [(8, 1, "PACK")] * 2),
        (request(4, 2, 2), (3,), []),  # the master itself is too small
        (replace(request(4, 2, 2), allowed_addresses=frozenset([MASTER])), (4,), []),  # no new node may be used
    ],
)
def test_what_an_autoscaler_is_asked_for(
    asked: DpRequest, free: tuple[int, ...], expected: list[tuple[int, int, str]]
) -> None:
    assert growth_demand(asked, cluster(*free)) == expected


def test_a_node_that_drains_is_named() -> None:
    nodes = [*cluster(2), NodeNpus("10.77.0.2", 0, 2, "draining, to be gone in 60 s")]
    assert "10.77.0.2: 0 of 2 (draining, to be gone in 60 s). So the nodes fit 1 rank" in error_text(
        request(2, 1, 2), nodes
    )


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
                f"{TWO}. The master 127.0.0.1 is not a live node of the Ray cluster. Set "
                "--data-parallel-address or VLLM_HOST_IP to this node's address there, one of: 10.77.0.1,10.77.0.2"
            ),
        ),
        (
            request(1, 1, 1, allowed_addresses=frozenset({SECOND, "10.77.0.8", "10.77.0.9"})),
            cluster(8, 8),
            (
                f"{TWO}. VLLM_RAY_DP_PLACEMENT_NODE_IPS names 10.77.0.8, 10.77.0.9: not a "
                "live node of the Ray cluster. Choose among: VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.2"
            ),
        ),
        (
            request(1, 1, 1, strategy="spread"),
            cluster(8),
            (
                "10.77.0.1: 8 of 8. VLLM_RAY_DP_PACK_STRATEGY accepts only strict, fill, span. "
                "Unset it, or: VLLM_RAY_DP_PACK_STRATEGY=strict"
            ),
        ),
    ],
)
def test_messages_that_no_other_placement_fixes(asked: DpRequest, nodes: list[NodeNpus], ending: str) -> None:
    assert error_text(asked, nodes).partition(" Free NPUs: ")[2] == ending


def test_the_message_names_the_allowed_nodes() -> None:
    message = error_text(request(9, 1, 1, allowed_addresses=frozenset({SECOND, MASTER})), cluster(1, 1))
    assert "strict, VLLM_RAY_DP_PLACEMENT_NODE_IPS=10.77.0.1,10.77.0.2). Free" in message


CURRENT = [PlacedRank(0, 0, MASTER), PlacedRank(1, 0, SECOND), PlacedRank(2, 2, SECOND)]


def test_scale_up_numbers_ranks_by_the_engines_own_on_each_node() -> None:
    ranks = plan_scale_up(CURRENT, 7, 2, MASTER, [*cluster(0, 5, 2)[1:], NodeNpus(MASTER, 2, 8)])
    assert places(ranks) == [(3, 1, MASTER), (4, 1, SECOND), (5, 3, SECOND), (6, 0, THIRD)]
    assert all(len(set(rank.bundle_addresses)) == 1 for rank in ranks)
    assert {len(rank.bundle_addresses) for rank in ranks} == {2}


def test_ranks_in_groups_of_the_caller_keep_their_places() -> None:
    """The engine actor's bundle is the last one; only the ranks that are added are planned."""
    current = placed_ranks([{0: SECOND, 1: SECOND, 2: MASTER}, {1: THIRD, 0: MASTER}, {}], [0, 1, 5])
    assert current == [PlacedRank(0, 0, MASTER), PlacedRank(1, 1, THIRD), PlacedRank(2, 5, "")]
    assert places(plan_scale_up(current, 5, 2, MASTER, cluster(2, 0, 2))) == [(3, 1, MASTER), (4, 0, THIRD)]


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
    assert str(raised.value) == f"VRA-230: Cannot scale from 3 to 6 data parallel ranks of 2 NPUs. Free NPUs: {ending}"


def test_scale_up_without_the_master() -> None:
    with pytest.raises(PlacementError, match=r"The master 10\.9\.9\.9 is not a live node"):
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


def check_placements(ranks: list[RankPlacement], nodes: list[NodeNpus], taken: list[tuple[str, int]]) -> None:
    """No node gets more bundles than free NPUs, and local ranks are one owner's each on their node."""
    used = Counter(address for rank in ranks for address in rank.bundle_addresses)
    free = {node.address: node.free for node in nodes}
    assert all(number <= free[address] for address, number in used.items())
    local = [*taken, *((rank.bundle_addresses[0], rank.local_dp_rank) for rank in ranks)]
    assert len(set(local)) == len(local)


@given(requests())
def test_properties_of_a_plan(case: tuple[DpRequest, list[NodeNpus]]) -> None:
    asked, nodes = case
    try:
        ranks = plan_placement(asked, nodes)
    except PlacementError:
        return
    assert [rank.dp_rank for rank in ranks] == list(range(asked.dp_size))
    assert {len(rank.bundle_addresses) for rank in ranks} == {asked.world_size}
    allowed = asked.allowed_addresses
    assert not allowed or {at for rank in ranks for at in rank.bundle_addresses} <= allowed | {MASTER}
    check_placements(ranks, nodes, [])


@given(requests())
def test_the_settings_that_an_error_suggests_make_it_fit(case: tuple[DpRequest, list[NodeNpus]]) -> None:
    asked, nodes = case
    try:
        plan_placement(asked, nodes)
        return
    except PlacementError as error:
        message = str(error)
    settings = message.partition("The request fits with: ")[2] or message.partition(", or: ")[2]
    if settings:
        assert len(plan_placement(changed(asked, settings), nodes)) == changed(asked, settings).dp_size
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
def test_properties_of_scale_up(nodes: list[NodeNpus], taken: set[tuple[str, int]], more: int, world_size: int) -> None:
    current = [PlacedRank(rank, local, address) for rank, (address, local) in enumerate(sorted(taken))]
    fits = sum(node.free // world_size for node in nodes)
    if more > fits:
        with pytest.raises(PlacementError, match=f"The nodes fit {fits} rank"):
            plan_scale_up(current, len(current) + more, world_size, MASTER, nodes)
        return
    ranks = plan_scale_up(current, len(current) + more, world_size, MASTER, nodes)
    assert [rank.dp_rank for rank in ranks] == list(range(len(current), len(current) + more))
    check_placements(ranks, nodes, sorted(taken))


def test_processes_of_an_moe_engine_are_pinned_to_their_node() -> None:
    assert is_tied_by_mp_backend(0, 2, "127.0.0.1", "10.0.0.1", free=2)
    assert is_tied_by_mp_backend(1, 2, "::1", "10.0.0.1", free=2)
    assert is_tied_by_mp_backend(0, 2, "10.0.0.1", "10.0.0.1", free=2)
    assert not is_tied_by_mp_backend(1, 2, "10.0.0.1", "10.0.0.1", free=0)


def test_processes_of_an_moe_engine_that_do_not_fit_on_their_node() -> None:
    with pytest.raises(ShortageError) as raised:
        is_tied_by_mp_backend(1, 4, "127.0.0.1", "10.0.0.1", free=3)
    assert str(raised.value) == (
        "VRA-231: Data parallel rank 1 of this MoE model needs 4 NPUs on this node (10.0.0.1), where 3 are free: with "
        "--data-parallel-backend mp the ranks connect at 127.0.0.1. Add --data-parallel-backend ray: the ranks that "
        "do not fit here then are on other nodes."
    )


def containers(*free: int) -> list[NodeNpus]:
    """Nodes of one host: one address, and ids of their own."""
    return [NodeNpus(MASTER, npus, npus, node_id=f"n{number}") for number, npus in enumerate(free, start=1)]


@pytest.mark.parametrize("strategy", ["strict", "fill"])
def test_nodes_that_share_an_address_are_distinguished(strategy: str) -> None:
    asked = request(3, 1, 2, strategy=strategy, master_id="n2")
    ranks = plan_placement(asked, containers(2, 2, 2))
    assert [rank.bundle_nodes for rank in ranks] == [("n2", "n2"), ("n1", "n1"), ("n3", "n3")]
    assert {rank.bundle_addresses[0] for rank in ranks} == {MASTER}
    assert {rank.strategy for rank in ranks} == {"STRICT_PACK"}


def test_a_rank_spans_nodes_that_share_an_address() -> None:
    for free in ((2, 2), (1, 3)):
        (rank,) = plan_placement(request(1, 1, 4, strategy="span", master_id="n1"), containers(*free))
        assert Counter(rank.bundle_nodes) == dict(zip(("n1", "n2"), free, strict=True)) and rank.strategy == "PACK"


def test_scale_up_numbers_the_ranks_of_each_node_that_shares_an_address() -> None:
    ranks = plan_scale_up([PlacedRank(0, 0, "n1")], 3, 1, "n1", containers(1, 1))
    assert [(rank.bundle_nodes, rank.local_dp_rank) for rank in ranks] == [(("n1",), 1), (("n2",), 0)]


@pytest.mark.parametrize(
    ("asked", "free", "size"),
    [
        pytest.param(request(4, 4, 4), (8, 8), 2, id="issue 2879"),
        pytest.param(request(4, 4, 1), (8, 8), 4, id="all on this node"),
        pytest.param(request(4, 4, 1), (3, 3), 3, id="as many as fit, the rest elsewhere"),
        pytest.param(request(12, 12, 1), (8, 4, 4), 4, id="fewer, so that the others fit as many"),
        pytest.param(request(12, 12, 1, strategy="fill"), (8, 2, 2), 8, id="fill"),
        pytest.param(request(2, 1, 4, strategy="span"), (2, 2, 2, 2), 1, id="span"),
        pytest.param(request(4, 4, 1), (0, 4), 4, id="held by an engine that may end"),
        pytest.param(request(20, 20, 1), (3, 2), 8, id="what is not there may join"),
        pytest.param(request(2, 2, 16), (8, 8), 1, id="fits nowhere"),
        pytest.param(request(4, 4, 1, master_address="10.77.0.9"), (8, 8), 4, id="no such master"),
    ],
)
def test_this_node_takes_as_many_ranks_as_it_has_room_for(asked: DpRequest, free: tuple[int, ...], size: int) -> None:
    assert fit_local_size(asked, cluster(*free)) == size


def test_a_node_without_npus_takes_no_rank_and_the_others_as_many_as_fit() -> None:
    """Such as a head of Kubernetes: unless the ranks connect to each other, which they do where rank 0 is."""
    nodes = [NodeNpus("10.77.0.1", 0, 0), *cluster(3, 2)[1:], NodeNpus("10.77.0.9", 3, 3)]
    asked = request(2, 2, 2)
    assert fit_local_size(asked, nodes) == 0
    placed = plan_placement(replace(asked, dp_size_local=0), nodes)
    assert [(rank.bundle_addresses[0], rank.local_dp_rank) for rank in placed] == [("10.77.0.2", 0), ("10.77.0.9", 0)]
    with pytest.raises(PlacementError, match="The request fits with: --data-parallel-size-local 0"):
        plan_placement(replace(asked, dp_size_local=1), nodes)
    meeting = replace(asked, ranks_meet=True)
    assert fit_local_size(meeting, nodes) == 1
    with pytest.raises(PlacementError, match="connect to each other at the master"):
        plan_placement(replace(meeting, dp_size_local=0), nodes)
    grown = growth_demand(replace(asked, dp_size_local=0, dp_size=3), nodes[:1])
    assert [(each.npus, each.cpus) for each in grown] == [(2, 1)] * 3


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from(["strict", "fill"]),
)
def test_where_some_number_of_ranks_here_fits_the_default_does(
    free: list[int], dp_size: int, world_size: int, strategy: str
) -> None:
    """And it is the largest such number."""
    nodes, asked = cluster(*free, total=6), request(dp_size, dp_size, world_size, strategy=strategy)

    def fits(size: int) -> bool:
        try:
            return bool(plan_placement(replace(asked, dp_size_local=size), nodes))
        except PlacementError:
            return False

    sizes = [size for size in range(1, dp_size + 1) if fits(size)]
    if sizes:
        assert fit_local_size(asked, nodes) == max(sizes)
