"""Who runs where, from Ray's numbers and the registry's records."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims, is_alive, unheeded_list
from vllm_ray_ascend.cluster.topology import NodeInput, lines, topology
from vllm_ray_ascend.devices.cards import Die

pytestmark = pytest.mark.unit

HEAD, SECOND = "10.0.0.1", "10.0.0.2"


def rank(number: int, address: str, physical: int) -> RankRecord:
    return RankRecord(
        rank=number,
        local_rank=0,
        address=address,
        visible=0,
        physical=physical,
        bundle=number,
        pid=100 + number,
        actor=f"w{number}",
    )


def engine(*ranks: RankRecord, share: float = 1.0, group: str = "aa") -> EngineRecord:
    return EngineRecord(
        engine="e1",
        dp_rank=1,
        model="zen",
        address=HEAD,
        pid=7,
        group=group,
        share=share,
        started=0.0,
        ranks=ranks,
    )


def node(address: str, declared: float, free: float, usable: tuple[int, ...] | None) -> NodeInput:
    return NodeInput(address=address, hostname="h", declared=declared, free=free, visible=None, usable=usable)


TABLE: dict[str, dict[str, Any]] = {
    "aa": {"state": "CREATED", "name": "ours", "bundles": {0: {"NPU": 1.0}}},
    "bb": {"state": "CREATED", "name": "trainer", "bundles": {0: {"NPU": 1.0}, 1: {"CPU": 1.0}}},
    "cc": {"state": "REMOVED", "name": "gone", "bundles": {0: {"NPU": 1.0}}},
    "dd": {"state": "CREATED", "name": "cpus", "bundles": {0: {"CPU": 1.0}}},
}


def test_text() -> None:
    found = topology(
        [node(HEAD, 2, 0, (4, 5)), node(SECOND, 1, 0, None)], [engine(rank(0, HEAD, 5), rank(1, SECOND, 3))], TABLE
    )
    assert list(lines(found)) == [
        "node 10.0.0.1 (h): 2 NPUs, 0 free",
        "  NPU 4   -",
        "  NPU 5   engine e1 rank 0 (bundle 0, pid 100)",
        "  1 of the NPUs without a rank are held by others",
        "node 10.0.0.2 (h): 1 NPUs, 0 free",
        "  NPU 3   engine e1 rank 1 (bundle 1, pid 101)",
        (
            "engine e1: zen, data parallel rank 1, 2 ranks on 10.0.0.1, 10.0.0.2; driver 10.0.0.1 pid 7; "
            "placement group aa"
        ),
        "placement group bb (trainer): 1 NPUs, no engine of ours",
    ]


def test_nothing_runs() -> None:
    found = topology([node(HEAD, 2, 2, (0, 1))], [], {})
    assert list(lines(found)) == [
        "node 10.0.0.1 (h): 2 NPUs, 2 free",
        "  NPU 0   -",
        "  NPU 1   -",
        "no engine is running",
    ]


def test_owners_of_a_shared_npu_are_all_named() -> None:
    found = topology([node(HEAD, 1, 0, (0,))], [engine(rank(0, HEAD, 0), rank(1, HEAD, 0), share=0.5)], {})
    assert [owner.rank for owner in found.nodes[0].npus[0].owners] == [0, 1]
    assert found.nodes[0].others == 0


def test_an_engine_is_alive_with_all_its_workers() -> None:
    record = engine(rank(0, HEAD, 0), rank(1, HEAD, 1))
    assert is_alive(record, {"w0", "w1", "x"}) and not is_alive(record, {"w0"})


def test_every_rank_is_an_owner() -> None:
    claimed = claims(engine(rank(0, HEAD, 5), share=0.5))
    assert [(c.owner, c.address, c.physical, c.share) for c in claimed] == [
        ("rank 0 of engine e1 (data parallel rank 1, zen)", HEAD, 5, 0.5)
    ]


@pytest.mark.parametrize("visible", [None, "", "4,5", "5"])
def test_a_list_that_the_ranks_here_follow_is_no_news(visible: str | None) -> None:
    assert unheeded_list(visible, HEAD, [engine(rank(0, HEAD, 5), rank(1, SECOND, 0))]) is None


def test_a_list_that_ray_did_not_heed() -> None:
    assert unheeded_list("4,6", HEAD, [engine(rank(0, HEAD, 5), rank(1, HEAD, 4))]) == (
        "ASCEND_RT_VISIBLE_DEVICES=4,6 is set here, but Ray has assigned NPU 4, 5 of this node: it counts by the list "
        "with which it was started. To have this one: `ray stop` here, then "
        "`ASCEND_RT_VISIBLE_DEVICES=4,6 ray start ...`."
    )


def test_dies_of_one_card_with_different_engines() -> None:
    dies = tuple(Die(card=number // 2, chip=number % 2, physical=number, name="Ascend910") for number in range(4))
    other = msgspec.structs.replace(engine(rank(0, HEAD, 3)), engine="e2")
    given = NodeInput(address=HEAD, hostname="h", declared=4, free=2, visible="2,3", usable=(2, 3), dies=dies)
    assert list(lines(topology([given], [engine(rank(0, HEAD, 2)), other], {})))[:4] == [
        "node 10.0.0.1 (h): 4 NPUs, 2 free, ASCEND_RT_VISIBLE_DEVICES=2,3",
        "  NPU 2 (card 1, die 0) engine e1 rank 0 (bundle 0, pid 100)",
        "  NPU 3 (card 1, die 1) engine e2 rank 0 (bundle 0, pid 100)",
        "  card 1 is shared by engine e1 and engine e2, and so is its bandwidth",
    ]
