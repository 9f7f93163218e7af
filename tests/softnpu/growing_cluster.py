"""A driver on a cluster with an autoscaler, or without one: what is asked for, and what is placed then.

python growing_cluster.py grows VERSION | stays      run by test_growing_cluster.py, in namespaces of its own
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.cluster_utils import AutoscalingCluster

from vllm_ray_ascend.cluster.connect import require_npus
from vllm_ray_ascend.cluster.growth import place_with_growth
from vllm_ray_ascend.cluster.placement_groups import (
    PlacementGroupSpec,
    create_placement_groups,
    free_npus_per_node,
    nodes_of_bundles,
    remove_placement_groups,
)
from vllm_ray_ascend.compat.autoscaler import find_autoscaler
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.errors import ClusterResourceError, ShortageError
from vllm_ray_ascend.executor.placement_group import create_group_of_whole_tp_groups

MARKER = "RESULT"
FOUR = PlacementGroupSpec("four", [{"NPU": 1.0}] * 4, "PACK")
SIZES = {"--tensor-parallel-size": 2, "--pipeline-parallel-size": 2}
NODE = {"resources": {"CPU": 2, "NPU": 3}, "node_config": {}, "min_workers": 0, "max_workers": 3}


_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


class GrowingCluster(AutoscalingCluster):  # type: ignore[misc]  # Ray's cluster_utils has no types
    """Ray's own. Its wheels lack the configuration of its fake provider, which an external one does not need."""

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], autoscaler_v2: bool = False, **_: Any
    ) -> dict[str, Any]:
        provider: dict[str, Any] = {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
        }
        if autoscaler_v2:
            provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "grows",
            "max_workers": 3,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "head_node_type": "ray.head.default",
            "provider": {**provider, "disable_launch_config_check": True},
            "available_node_types": {"ray.head.default": head, **worker_node_types},
            **{name: [] for name in _LISTS},
        }


def start_growing(version: str) -> None:
    head = {"CPU": 2, "object_store_memory": 128 << 20}
    GrowingCluster(head, {"npu": NODE}, autoscaler_v2=version == "2").start()


def start_staying(*_: str) -> None:
    command = ["ray", "start", "--head", "--num-cpus=2", '--resources={"NPU": 1}', f"--object-store-memory={128 << 20}"]
    subprocess.check_call([*command, "--include-dashboard=false"])


def grow() -> dict[str, Any]:
    require_npus(4, SIZES, demand=[FOUR])
    group = create_group_of_whole_tp_groups(FOUR, 2)
    found: dict[str, Any] = {"autoscaler": find_autoscaler(), "nodes": list(nodes_of_bundles(group).values())}
    remove_placement_groups([group])
    held = create_placement_groups([three("held"), three("held too")], 60)
    found["after"] = wait_for_a_node_of_three(three("more"))
    remove_placement_groups(held)
    os.environ["VLLM_RAY_ASCEND_NPU_WAIT_S"] = "4"
    try:
        place_with_growth(refuse, lambda: [PlacementGroupSpec("many", [{"NPU": 1.0}] * 100, "PACK")], lambda: 0.0)
    except ClusterResourceError as error:
        found["refusal"] = str(error)
    return {**found, "groups": living_groups()}


def three(name: str) -> PlacementGroupSpec:
    return PlacementGroupSpec(name, [{"NPU": 1.0}] * 3, "STRICT_PACK")


def wait_for_a_node_of_three(spec: PlacementGroupSpec) -> int:
    """As data parallel placement does, whose ranks each need a node."""

    def most_free(groups: Any) -> int:
        free = max(node.free for node in free_npus_per_node(NPU, groups))
        return free if free >= 3 else refuse(groups)

    return place_with_growth(most_free, lambda: [spec], lambda: 0.0)


def refuse(_: Any) -> Any:
    raise ShortageError("VRA-229", "too few NPUs")


def stay() -> dict[str, Any]:
    found: dict[str, Any] = {"autoscaler": find_autoscaler()}
    try:
        require_npus(4, SIZES, demand=[FOUR])
    except ClusterResourceError as error:
        found["refusal"] = str(error)
    return {**found, "groups": living_groups()}


def living_groups() -> list[str]:
    return [each["name"] for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    kind, *version = sys.argv[1:]
    (start_growing if kind == "grows" else start_staying)(*version)
    ray.init("auto", logging_level="ERROR")
    print(MARKER + json.dumps(grow() if kind == "grows" else stay()), flush=True)
