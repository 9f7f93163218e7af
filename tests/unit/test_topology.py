"""Who runs where, from Ray's counts and the registry's records."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims_of_engine, ignored_list_warning, is_alive
from vllm_ray_ascend.cluster.topology import NodeInput, build_topology, format_lines
from vllm_ray_ascend.devices.cards import Die

pytestmark = pytest.mark.unit

HEAD, SECOND = "10.0.0.1", "10.0.0.2"


def rank(number: int, address: str, physical_id: int) -> RankRecord:
    return RankRecord(
        rank=number,
        local_rank=0,
        address=address,
        visible_index=0,
        physical_id=physical_id,
        bundle_index=number,
        pid=100 + number,
        actor_name=f"w{number}",
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


def node(address: str, declared: float, free: float, usable_ids: tuple[int, ...] | None) -> NodeInput:
    return NodeInput(
        address=address, hostname="h", declared=declared, free=free, visible_devices=None, usable_ids=usable_ids
    )


TABLE: dict[str, dict[str, Any]] = {
    "aa": {"state": "CREATED", "name": "ours", "bundles": {0: {"NPU": 1.0}}},
    "bb": {"state": "CREATED", "name": "trainer", "bundles": {0: {"NPU": 1.0}, 1: {"CPU": 1.0}}},
    "cc": {"state": "REMOVED", "name": "gone", "bundles": {0: {"NPU": 1.0}}},
    "dd": {"state": "CREATED", "name": "cpus", "bundles": {0: {"CPU": 1.0}}},
}


def test_text() -> None:
    found = build_topology(
        [node(HEAD, 2, 0, (4, 5)), node(SECOND, 1, 0, None)], [engine(rank(0, HEAD, 5), rank(1, SECOND, 3))], TABLE
    )
    assert list(format_lines(found)) == [
        "node 10.0.0.1 (h): 2 NPUs, 0 free",
        "  NPU 4   -",
        "  NPU 5   engine zen/dp1 rank 0 (bundle 0, pid 100)",
        "  1 of the NPUs without an owner: held by others",
        "node 10.0.0.2 (h): 1 NPUs, 0 free",
        "  NPU 3   engine zen/dp1 rank 1 (bundle 1, pid 101)",
        ("engine zen/dp1: 2 ranks on 10.0.0.1, 10.0.0.2; driver 10.0.0.1 pid 7; placement group aa"),
        "placement group bb (trainer): 1 NPUs, not of an engine of this plugin",
    ]


def test_nothing_runs() -> None:
    found = build_topology([node(HEAD, 2, 2, (0, 1))], [], {})
    assert list(format_lines(found)) == [
        "node 10.0.0.1 (h): 2 NPUs, 2 free",
        "  NPU 0   -",
        "  NPU 1   -",
        "no engine is running",
    ]


def test_owners_of_a_shared_npu_are_all_named() -> None:
    found = build_topology([node(HEAD, 1, 0, (0,))], [engine(rank(0, HEAD, 0), rank(1, HEAD, 0), share=0.5)], {})
    assert [owner.rank for owner in found.nodes[0].npus[0].owners] == [0, 1]
    assert found.nodes[0].others == 0


def test_json_keys_for_users_stay() -> None:
    found = build_topology([node(HEAD, 1, 0, (0,))], [engine(rank(0, HEAD, 0))], TABLE)
    data = msgspec.to_builtins(found)
    assert {"address", "visible", "npus", "device"} <= data["nodes"][0].keys()
    assert data["nodes"][0]["npus"][0].keys() == {"physical", "name", "owners"}
    assert data["nodes"][0]["npus"][0]["owners"][0].keys() == {"engine", "dp_rank", "rank", "bundle", "pid"}
    assert {"visible", "physical", "bundle", "actor"} <= data["engines"][0]["ranks"][0].keys()
    assert data["engines"][0]["device"] == data["groups"][0]["device"] == "NPU"


def test_an_engine_is_alive_with_all_its_workers() -> None:
    record = engine(rank(0, HEAD, 0), rank(1, HEAD, 1))
    assert is_alive(record, {"w0", "w1", "x"}) and not is_alive(record, {"w0"})


def test_every_rank_is_an_owner() -> None:
    claimed = claims_of_engine(engine(rank(0, HEAD, 5), share=0.5))
    assert [(c.owner, c.address, c.physical_id, c.share) for c in claimed] == [
        ("rank 0 of engine zen/dp1", HEAD, 5, 0.5)
    ]


@pytest.mark.parametrize("visible_devices", [None, "", "4,5", "5"])
def test_a_list_that_the_ranks_here_follow_causes_no_warning(visible_devices: str | None) -> None:
    assert ignored_list_warning(visible_devices, HEAD, [engine(rank(0, HEAD, 5), rank(1, SECOND, 0))]) is None


def test_a_list_that_ray_ignored() -> None:
    assert ignored_list_warning("4,6", HEAD, [engine(rank(0, HEAD, 5), rank(1, HEAD, 4))]) == (
        "VRA-238: ASCEND_RT_VISIBLE_DEVICES=4,6 is set here, but Ray has assigned NPU 4, 5 of this node: it uses the "
        "list with which it was started. To use this list: `ray stop` here, then "
        "`ASCEND_RT_VISIBLE_DEVICES=4,6 ray start ...`."
    )


def test_dies_of_one_card_with_different_engines() -> None:
    dies = tuple(Die(card=number // 2, chip=number % 2, physical_id=number, name="Ascend910") for number in range(4))
    other = msgspec.structs.replace(engine(rank(0, HEAD, 3)), engine="e2")
    given = NodeInput(
        address=HEAD, hostname="h", declared=4, free=2, visible_devices="2,3", usable_ids=(2, 3), dies=dies
    )
    assert list(format_lines(build_topology([given], [engine(rank(0, HEAD, 2)), other], {})))[:4] == [
        "node 10.0.0.1 (h): 4 NPUs, 2 free, ASCEND_RT_VISIBLE_DEVICES=2,3",
        "  NPU 2 (card 1, die 0) engine zen/dp1 (e1) rank 0 (bundle 0, pid 100)",
        "  NPU 3 (card 1, die 1) engine zen/dp1 (e2) rank 0 (bundle 0, pid 100)",
        "  card 1 is shared by engine zen/dp1 (e1) and engine zen/dp1 (e2), and so is its bandwidth",
    ]


def test_nodes_that_share_an_address() -> None:
    """Containers of one host: each has its own NPU 0. A record of an earlier version knows no ids."""
    nodes = [msgspec.structs.replace(node(HEAD, 1, 0, (0,)), node_id=node_id) for node_id in ("n1", "n2")]
    record = engine(msgspec.structs.replace(rank(0, HEAD, 0), node_id="n2"))
    first, second = build_topology(nodes, [record], {}).nodes
    assert (len(first.npus[0].owners), len(second.npus[0].owners)) == (0, 1)
    lines = list(format_lines(build_topology(nodes, [record], {})))
    assert "node 10.0.0.1 (h, Ray node n2): 1 NPUs, 0 free" in lines
    old = msgspec.json.decode(
        msgspec.json.encode(engine(rank(0, HEAD, 0))).replace(b',"node":""', b""), type=EngineRecord
    )
    assert [len(each.npus[0].owners) for each in build_topology(nodes[:1], [old], {}).nodes] == [1]


def test_a_list_that_ray_ignored_on_a_node_that_shares_its_address() -> None:
    record = engine(msgspec.structs.replace(rank(0, HEAD, 5), node_id="n2"))
    assert ignored_list_warning("4", HEAD, [record], node_id="n1") is None
    assert "VRA-238" in str(ignored_list_warning("4", HEAD, [record], node_id="n2"))
