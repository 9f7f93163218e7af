"""What of doctor's checks is said before an engine starts, and what keeps it from starting; over recorded machines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from tests.doctor.machine import Machine
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.doctor.before_start import findings_at_start
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.doctor.records import Failure, NodeRecord, RayNode, SharedMemory, Snapshot

pytestmark = pytest.mark.unit


def record(host: int, name: str = "a2", **changes: Any) -> NodeRecord:
    """Return what is collected on a node before a start: no tool was asked."""
    return replace(Machine(name, host=host).record(), outputs={}, **changes)


def snapshot(*records: NodeRecord, failures: tuple[Failure, ...] = ()) -> Snapshot:
    return Snapshot(
        version="0.1.0",
        time=0.0,
        level="quick",
        head_address="10.0.0.1:6379",
        nodes=list(records),
        failures=list(failures),
    )


def found(
    *records: NodeRecord,
    failures: tuple[Failure, ...] = (),
    environ: Mapping[str, str] = os.environ,
    all_used: bool = True,
    spans_nodes: bool = True,
) -> list[Finding]:
    made = snapshot(*records, failures=failures)
    return findings_at_start(made, environ, all_used=all_used, spans_nodes=spans_nodes)


def kinds(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.code, finding.address) for finding in findings]


def switched_off(host: int) -> NodeRecord:
    made = record(host)
    return replace(made, facts=dataclasses.replace(made.facts, switches={"VLLM_RAY_ASCEND": "0"}))


def of_another_cann(host: int) -> NodeRecord:
    return record(host, "other-cann")


def with_variable(host: int, value: str) -> NodeRecord:
    return record(host, environment={"HCCL_DETERMINISTIC": value})


def test_checks_before_a_start_ask_no_tool_and_are_in_every_report() -> None:
    made = [check for check in CHECKS.values() if check.at_start != "skipped"]
    assert not any(check.queries for check in made)
    assert set(made) <= set(choose_checks("quick"))


@pytest.mark.parametrize("machine", ["a2", "a3", "a2-container"])
def test_nothing_is_said_of_healthy_nodes(machine: str) -> None:
    assert found(record(1, machine), record(2, machine)) == []


def test_how_npus_are_declared_keeps_the_engine_from_starting() -> None:
    assert kinds(found(record(1), switched_off(2))) == [("error", "VRA-207", "10.0.0.2")]


def test_the_words_are_those_of_doctor() -> None:
    bad = record(2, shared_memory=SharedMemory(64 << 20, 64 << 20), unreachable={"10.0.0.1:7000": "timed out"})
    said = found(record(1), bad)
    report = make_report(snapshot(record(1), bad), choose_checks("quick"))
    assert kinds(said) == [("warning", "VRA-672", "10.0.0.2"), ("warning", "VRA-676", "10.0.0.2")]
    assert {(each.text, each.remedy) for each in said} <= {(each.text, each.remedy) for each in report.findings}


def test_nodes_are_compared_where_the_engine_needs_more_than_one() -> None:
    nodes = [record(1), of_another_cann(2)]
    assert ("warning", "VRA-617", "10.0.0.2") in kinds(found(*nodes))
    assert found(*nodes, spans_nodes=False) == []


def test_a_variable_that_the_driver_copies_to_workers_may_differ_on_nodes() -> None:
    nodes = [with_variable(1, "true"), with_variable(2, "false")]
    assert kinds(found(*nodes)) == [("warning", "VRA-678", "10.0.0.2")]
    assert found(*nodes, environ={"HCCL_DETERMINISTIC": "true"}) == []


def test_a_node_that_declares_no_npu_is_an_error_only_where_it_is_used() -> None:
    undeclared = record(2, ray=RayNode(npus=0, gpus=0, free_npus=0, sent=100.0, received=103.1))
    assert kinds(found(record(1), undeclared, all_used=False)) == [("warning", "VRA-202", "10.0.0.2")]
    assert kinds(found(record(1), undeclared)) == [("error", "VRA-202", "10.0.0.2")]


def test_a_node_without_npus_is_no_finding() -> None:
    bare = record(2, ray=RayNode(npus=0, gpus=0, free_npus=0, sent=100.0, received=103.1))
    bare = replace(bare, facts=dataclasses.replace(bare.facts, cann_devices=None, device_files=(), dies=()))
    assert found(bare, record(1), all_used=False) == []


def test_a_node_that_does_not_answer() -> None:
    missing = Failure("10.0.0.2", 8, "No module named 'vllm_ray_ascend'")
    slow = Failure("10.0.0.3", 8, "no answer within 20 s")
    assert kinds(found(record(1), failures=(missing, slow))) == [
        ("error", "VRA-215", "10.0.0.2"),
        ("warning", "VRA-216", "10.0.0.3"),
    ]
