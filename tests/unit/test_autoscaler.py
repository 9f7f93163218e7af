"""What an autoscaler reports, and what a head reports that has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.cluster.growth import format_demand
from vllm_ray_ascend.cluster.placement_groups import PlacementGroupSpec
from vllm_ray_ascend.compat.autoscaler import describe_v1, describe_v2

pytestmark = pytest.mark.unit

READ_ONLY = "node_0e14801c87a497ed6a5c83b171ebd26062b5f77c419a8a0bf2b0e9ad"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, ""),  # nobody has reported
        ({"load_metrics_report": {}}, ""),
        ({"autoscaler_report": {"active_nodes": {READ_ONLY: 1}}}, ""),  # `ray start --head`
        ({"autoscaler_report": {"active_nodes": None}}, ""),
        (
            {"autoscaler_report": {"active_nodes": {"npu": 2, "head-group": 1}}},
            "Ray's autoscaler, version 1 (node types now: head-group, npu)",
        ),
        (
            {"autoscaler_report": {"active_nodes": {"node_small": 1}}},  # a type of somebody who likes the prefix
            "Ray's autoscaler, version 1 (node types now: node_small)",
        ),
    ],
)
def test_version_1(status: dict[str, Any], expected: str) -> None:
    assert describe_v1(status) == expected


@pytest.mark.parametrize(
    ("reports", "nodes", "expected"),
    [
        (0, [("i-1", "npu")], ""),  # the autoscaler has not started yet, or never will
        (7, [("", "")], ""),  # RAY_enable_autoscaler_v2=1 ray start --head
        (7, [("i-0", "head"), ("i-1", "npu")], "Ray's autoscaler, version 2 (node types now: head, npu)"),
        (7, [("i-0", "")], "Ray's autoscaler, version 2 (node types now: unnamed)"),
    ],
)
def test_version_2(reports: int, nodes: list[tuple[str, str]], expected: str) -> None:
    states = [SimpleNamespace(instance_id=i, ray_node_type_name=name, instance_type_name="") for i, name in nodes]
    reply = SimpleNamespace(
        autoscaling_state=SimpleNamespace(autoscaler_state_version=reports),
        cluster_resource_state=SimpleNamespace(node_states=states),
    )
    assert describe_v2(reply) == expected


def test_a_demand_is_shown_as_ray_status_does() -> None:
    one = PlacementGroupSpec("a", [{"NPU": 1.0}] * 4 + [{"CPU": 1.0}], "STRICT_PACK")
    two = [one, one._replace(name="b"), PlacementGroupSpec("c", [{"NPU": 1.0}] * 2, "PACK")]
    assert format_demand(two) == (
        "2 x [{'NPU': 1.0} * 4, {'CPU': 1.0} * 1] (STRICT_PACK) and [{'NPU': 1.0} * 2] (PACK)"
    )
