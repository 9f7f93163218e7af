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
from vllm_ray_ascend.doctor.before_start import refusing_findings, warnings_of_nodes
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.doctor.records import Failure, Limit, NodeRecord, RayNode, SharedMemory, Snapshot

pytestmark = pytest.mark.unit


def record(host: int, name: str = "a2", **changes: Any) -> NodeRecord:
    """Return what is collected on a node before a start: no tool was asked."""
    made = Machine(name, host=host).record()
    ray = made.ray and replace(made.ray, node_id=f"node{host}", raylet=f"10.0.0.{host}:7000")
    return replace(made, outputs={}, **{"ray": ray, **changes})


def snapshot(*records: NodeRecord, failures: tuple[Failure, ...] = ()) -> Snapshot:
    return Snapshot(
        version="0.1.0",
        time=0.0,
        level="quick",
        head_address="10.0.0.1:6379",
        nodes=list(records),
        failures=list(failures),
    )


def found(*records: NodeRecord, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return all that is said of an engine on these nodes."""
    made, used = snapshot(*records), [node_id(record) for record in records]
    return [*refusing_findings(made, all_used=True), *warnings_of_nodes(made, used, environ)]


def node_id(record: NodeRecord) -> str:
    return record.ray.node_id if record.ray else ""


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


def test_nodes_are_compared_where_the_engine_is_on_both() -> None:
    nodes = [record(1), of_another_cann(2)]
    assert kinds(found(*nodes)) == [("warning", "VRA-617", "10.0.0.2")]
    assert warnings_of_nodes(snapshot(*nodes), ["node2"], {}) == []


def test_only_nodes_of_the_engine_have_to_reach_each_other() -> None:
    cut_off = record(2, unreachable={"10.0.0.1:7000": "timed out"})
    nodes = [record(1), cut_off, record(3)]
    assert kinds(warnings_of_nodes(snapshot(*nodes), ["node1", "node2"], {})) == [("warning", "VRA-676", "10.0.0.2")]
    assert warnings_of_nodes(snapshot(*nodes), ["node2", "node3"], {}) == []


def test_what_is_usual_of_containers_is_no_warning() -> None:
    """64 KiB of locked memory, 1024 files, a driver CANN does not list, /dev/shm of 1 GiB, Python's patch level."""
    limits = {"Max open files": Limit(1024, 1048576), "Max locked memory": Limit(64 << 10, 64 << 10)}
    memory = SharedMemory(1 << 30, 1000 << 20)
    versions = {**record(2).versions, "Python": "3.11.9"}
    assert found(record(1), record(2, limits=limits, shared_memory=memory, versions=versions)) == []
    assert found(record(2, "old-driver")) == []


def test_a_variable_that_the_driver_copies_to_workers_may_differ_on_nodes() -> None:
    nodes = [with_variable(1, "true"), with_variable(2, "false")]
    assert kinds(found(*nodes)) == [("warning", "VRA-678", "10.0.0.2")]
    assert found(*nodes, environ={"HCCL_DETERMINISTIC": "true"}) == []


def declaring(npus: int) -> RayNode:
    return RayNode(node_id="node2", npus=npus, gpus=0, free_npus=npus, sent=100.0, received=103.1)


def test_a_node_that_declares_no_npu_is_an_error_only_where_it_is_used() -> None:
    made = snapshot(record(1), record(2, ray=declaring(0)))
    assert kinds(refusing_findings(made, all_used=False)) == [("warning", "VRA-202", "10.0.0.2")]
    assert kinds(refusing_findings(made, all_used=True)) == [("error", "VRA-202", "10.0.0.2")]


def test_a_node_without_npus_is_no_finding() -> None:
    bare = record(2, ray=declaring(0))
    bare = replace(bare, facts=dataclasses.replace(bare.facts, cann_devices=None, device_files=(), dies=()))
    assert refusing_findings(snapshot(bare, record(1)), all_used=False) == [] == found(bare, record(1))


def test_a_node_that_does_not_answer() -> None:
    missing = Failure("10.0.0.2", 8, "No module named 'vllm_ray_ascend'")
    slow = Failure("10.0.0.3", 8, "no answer within 20 s")
    made = snapshot(record(1), failures=(missing, slow))
    assert kinds(refusing_findings(made, all_used=True)) == [
        ("error", "VRA-215", "10.0.0.2"),
        ("warning", "VRA-216", "10.0.0.3"),
    ]
    assert warnings_of_nodes(made, ["node1"], {}) == []
