"""The topology as an HTML page: everything is on it, escaped, and nothing comes from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from msgspec.structs import replace

from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, engine_names
from vllm_ray_ascend.cluster.topology import NodeInput, Topology, build_topology
from vllm_ray_ascend.cluster.topology_page import format_page, links_between_nodes
from vllm_ray_ascend.compat.ray_state import ActorRecord

pytestmark = pytest.mark.unit

ADDRESSES = ("10.0.0.1", "10.0.0.2")
VOID = {"meta", "input", "br", "td", "th"}


def engine(dp_rank: int, first: int, model: str = "Qwen3-30B-A3B") -> EngineRecord:
    """An engine with TP 2 and PP 2, one stage on each node, on NPUs ``first`` and the next one."""
    ranks = tuple(
        RankRecord(
            rank=rank,
            local_rank=rank % 2,
            address=ADDRESSES[rank // 2],
            visible_index=rank % 2,
            physical_id=first + rank % 2,
            bundle_index=rank,
            pid=4700 + 10 * dp_rank + rank,
            actor_name=f"w{dp_rank}{rank}",
        )
        for rank in range(4)
    )
    return EngineRecord(
        engine=f"1234567890123456789_dp{dp_rank}",
        dp_rank=dp_rank,
        model=f"/models/{model}",
        address=ADDRESSES[0],
        pid=4600 + dp_rank,
        group=f"aa{dp_rank}",
        share=1.0,
        started=1795930000.0,
        ranks=ranks,
        tensor_parallel=2,
        pipeline_parallel=2,
    )


def sample() -> tuple[Topology, list[Finding]]:
    """Two nodes of 8 NPUs, two engines, an actor of somebody else, a link that is down."""
    nodes = [
        NodeInput(
            address=address,
            hostname=f"node-{number}",
            declared=8,
            free=3,
            visible_devices=None,
            usable_ids=tuple(range(8)),
            node_id=f"id{number}",
        )
        for number, address in enumerate(ADDRESSES, 1)
    ]
    trainer = ActorRecord(
        class_name="Trainer",
        name="<trainer & co>",
        namespace="training",
        pid=5120,
        job_id="02000000",
        node_id="id1",
        worker_id="ab",
        owner_id="cd",
        group_id="",
        resources={"NPU": {6: 1.0}},
    )
    findings = [
        Finding(ADDRESSES[1], "error", "VRA-650", "its RoCE link is down.", "Check the cable <3>.", 3, "roce-link"),
        Finding("", "warning", "VRA-630", "drivers differ", "install one", check="versions"),
    ]
    table = {
        "aa0": {"state": "CREATED", "name": "", "bundles": {}},
        "aa1": {"state": "CREATED", "name": "", "bundles": {}},
    }
    return build_topology(nodes, [engine(0, 0), engine(1, 2)], table, [trainer]), findings


class Checker(HTMLParser):
    """Collects text, and fails where elements are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ranks = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ranks += ("class", "rank") in attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_everything_is_on_the_page() -> None:
    topology, findings = sample()
    page = format_page(topology, findings, 1795937000.0)
    checker = Checker()
    checker.feed(page)
    text = " ".join("".join(checker.text).split())
    assert checker.open == [] and checker.ranks == 8
    for each in (*ADDRESSES, "node-1", "Qwen3-30B-A3B/dp0", "Qwen3-30B-A3B/dp1", "PP 1 TP 1", "<trainer & co>"):
        assert each in text, each
    assert "VRA-650 10.0.0.2, NPU 3: its RoCE link is down." in text and "Check the cable <3>." in text
    assert "2 nodes, 16 NPUs, 9 in use, 2 engines. doctor: ✖ error" in text
    assert "1234567890123456789" not in page
    assert "http-equiv" not in page and 'content="5"' in format_page(topology, findings, 0.0, 5.0)


def test_links_between_nodes_have_the_state_of_their_npus() -> None:
    topology, findings = sample()
    page = format_page(topology, findings, 0.0)
    rows = [" ".join(re.sub("<[^>]*>", " ", f"<{row}").split()) for row in page.split("<tr") if "PP 0 →" in row]
    assert [row.partition("Qwen3-30B-A3B/")[2].partition(" Findings")[0] for row in rows] == [
        "dp0 PP 0 → 1 10.0.0.1 NPU 0, 1 10.0.0.2 NPU 0, 1 ✔ ok",
        "dp1 PP 0 → 1 10.0.0.1 NPU 2, 3 10.0.0.2 NPU 2, 3 ✖ error",
    ]


def test_tensor_parallel_ranks_of_two_nodes_are_linked() -> None:
    stretched = replace(engine(0, 0), tensor_parallel=4, pipeline_parallel=1)
    ((what, here, there),) = links_between_nodes(stretched)
    assert what == "TP of stage 0"
    assert [[rank.rank for rank in end] for end in (here, there)] == [[0, 1], [2, 3]]


def test_an_engine_on_one_node_has_no_links() -> None:
    ranks = tuple(replace(rank, address=ADDRESSES[0]) for rank in engine(0, 0).ranks)
    assert links_between_nodes(replace(engine(0, 0), ranks=ranks)) == []


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = format_page(*sample(), 0.0)
    assert not re.search(r"https?://|<script|<link|src=|@import|url\(", page)


def test_an_empty_cluster_is_a_page_too() -> None:
    page = format_page(build_topology([], [], {}), [], 0.0)
    assert "no engine is running" in page and "0 nodes" in page


def test_a_record_of_an_earlier_version_has_no_position() -> None:
    topology, findings = sample()
    old = replace(topology, engines=tuple(replace(each, tensor_parallel=0) for each in topology.engines))
    assert "PP 0" not in format_page(old, findings, 0.0)


def test_engines_have_the_name_of_their_model_and_the_id_where_that_is_not_enough() -> None:
    first, second = engine(0, 0), engine(1, 2)
    assert list(engine_names([first, second]).values()) == ["Qwen3-30B-A3B/dp0", "Qwen3-30B-A3B/dp1"]
    twin = replace(first, engine="42")
    assert list(engine_names([first, twin]).values()) == [
        "Qwen3-30B-A3B/dp0 (1234567890123456789_dp0)",
        "Qwen3-30B-A3B/dp0 (42)",
    ]
