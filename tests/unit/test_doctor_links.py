"""Pairs of nodes for `doctor --deep`, and what is said of their times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vllm_ray_ascend.doctor.judge import make_report
from vllm_ray_ascend.doctor.links import judge_links, rounds
from vllm_ray_ascend.doctor.records import Failure, Link, Snapshot
from vllm_ray_ascend.doctor.text import format_report

pytestmark = pytest.mark.unit

LINKS = [
    Link(f"10.0.0.{a}", 0, f"10.0.0.{b}", 4, "", 1.25, 0.002, 0.001, 0.001, 400 << 20)
    for a, b in ((1, 2), (3, 4), (1, 3), (2, 4))
]


def test_rounds_of_four_nodes() -> None:
    assert rounds(4) == [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]
    assert rounds(0) == rounds(1) == []


@given(st.integers(2, 200))
def test_every_node_is_tested_in_log2_rounds_and_once_a_round(count: int) -> None:
    found = rounds(count)
    assert len(found) == math.ceil(math.log2(count))
    for pairs in found:
        nodes = [node for pair in pairs for node in pair]
        assert len(set(nodes)) == len(nodes) and all(0 <= node < count for node in nodes)
    joined = {0}
    for _ in range(count):
        joined |= {node for pairs in found for pair in pairs if joined & set(pair) for node in pair}
    assert joined == set(range(count)), "a network that is in two parts would not be noticed"


def test_equal_pairs_have_no_findings() -> None:
    assert list(judge_links(LINKS)) == []


def test_a_pair_that_fails_is_an_error_at_its_first_node() -> None:
    (finding,) = judge_links([*LINKS[1:], replace(LINKS[0], error="HCCL error 9")])
    assert (finding.severity, finding.code, finding.address, finding.physical_id) == ("error", "VRA-690", "10.0.0.1", 0)
    assert "NPU 4 of 10.0.0.2 fails: HCCL error 9." in finding.text and finding.values["second"] == "10.0.0.2"


def test_a_slow_pair_is_a_warning_against_the_others() -> None:
    found = list(judge_links([*LINKS[1:], replace(LINKS[0], all_reduce_s=0.05, receive_s=0.02)]))
    assert [finding.code for finding in found] == ["VRA-691", "VRA-691"]
    assert "all-reduce" in found[0].text and "takes 50.0 ms, of 4 pairs the median is 2.0 ms" in found[0].text
    assert list(judge_links([replace(LINKS[0], all_reduce_s=0.05), LINKS[1]])) == [], "two pairs say nothing"


def test_a_busy_node_is_unknown() -> None:
    (finding,) = judge_links([], ["10.0.0.9"])
    assert (finding.severity, finding.code, finding.address) == ("unknown", "VRA-692", "10.0.0.9")


def test_the_report_has_times_and_findings() -> None:
    snapshot = Snapshot(
        version="0.1.0",
        time=0.0,
        level="full",
        nodes=[],
        failures=[Failure("10.0.0.7", 8, "late")],
        links=[*LINKS[1:], replace(LINKS[0], error="HCCL error 9")],
    )
    report = make_report(snapshot, [])
    assert report.status == "critical" and len(report.links) == 4
    text = "\n".join(format_report(report))
    assert (
        "  HCCL 10.0.0.3 NPU 0 - 10.0.0.4 NPU 4: connected in 1.2 s, 16 MiB: all-reduce 2.0 ms, send 1.0 ms, "
        "receive 1.0 ms; 400 MiB" in text
    )
    assert "ERROR VRA-690 [hccl-links]" in text
