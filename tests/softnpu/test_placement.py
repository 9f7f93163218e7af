"""Placement groups on three nodes of three NPUs: whole tensor parallel groups, groups of users, nodes that drain."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import manager, namespaces
from softnpu.cluster.plan import Cluster, Shape

from tests.softnpu.processes import read_result, run_on_node

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]

NAME = f"placement-{os.getpid()}"
ROOT = str(Path(__file__).resolve().parents[2])
LIMIT_S = 120

PRELUDE = """
import json, logging, sys, time, ray
from types import SimpleNamespace
logging.basicConfig(format="%(message)s")
from vllm_ray_ascend.cluster.connect import connect_as_observer, npu_wait_s, require_npus
from vllm_ray_ascend.cluster.placement_groups import *
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.executor.placement_group import create_group_of_whole_tp_groups, rank_bundles
from vllm.platforms import current_platform
connect_as_observer()
places = {row["NodeID"]: row["NodeManagerAddress"][-1] for row in ray.nodes()}
def create(tp, number, name="engine"):
    return create_group_of_whole_tp_groups(PlacementGroupSpec(name, [{"NPU": 1.0}] * number, "PACK"), tp)
def config(tp, world):
    return SimpleNamespace(tensor_parallel_size=tp, world_size=world)
def ranks(group, tp, world):
    return "".join(places[node] for _, node, _ in rank_bundles(group, config(tp, world)))
def report(value):
    print("RESULT" + json.dumps(value))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made, _ = manager.up(NAME, Shape(nodes=3, npus_per_node=3, cpus_per_node=1))
    yield made
    manager.down(NAME)


def run_on_head(cluster: Cluster, code: str) -> tuple[Any, str]:
    """Return what ``code`` reports on the head node, and what it logs."""
    done = run_on_node(cluster, 1, PRELUDE + textwrap.dedent(code), limit_s=LIMIT_S, PYTHONPATH=ROOT)
    return read_result(done), done.stdout + done.stderr


def test_scale_up_leaves_the_callers_groups_alone(cluster: Cluster) -> None:
    """Two ranks run in groups of the caller, on its first two nodes: one further rank is one further group."""
    found, _ = run_on_head(
        cluster,
        """
        from vllm_ray_ascend.devices.kind import NPU
        from vllm_ray_ascend.engine.manager import RayAscendEngineActorManager
        ids = sorted(places, key=places.get)
        def of_caller(node):
            spec = PlacementGroupSpec("caller" + node, [{"NPU": 1.0}] * 2, "PACK")
            return pin_to_nodes(spec, [node] * 2, current_nodes())
        given = create_placement_groups([of_caller(ids[0]), of_caller(ids[1])], 20)
        manager = object.__new__(RayAscendEngineActorManager)
        try:
            manager.__init__(None, None, None, False, given, [0, 0])  # there is no config to start engines with
        except AttributeError:
            pass
        manager.created_placement_groups = []
        engine = SimpleNamespace(
            instance_id="e", parallel_config=SimpleNamespace(world_size=1, data_parallel_master_ip=""))
        added = []
        for size in (3, 4):
            groups, numbers = manager.add_dp_placement_groups(engine, size)
            manager.created_placement_groups += groups
            nodes = [places[node] for group in groups for node in set(nodes_of_bundles(group).values())]
            added.append([[placement.dp_rank for placement in manager.placements], numbers, nodes])
        remove_placement_groups([*given, *manager.created_placement_groups])
        report(added)
        """,
    )
    assert found == [[[2], [1], ["1"]], [[2, 3], [1], ["2"]]]


def test_tensor_parallel_groups_are_whole_on_a_node(cluster: Cluster) -> None:
    """On nodes of 3; beside another engine, which takes NPUs of each; and where no node has enough of them."""
    found, log = run_on_head(
        cluster,
        """
        first = create(2, 4)
        second = create(1, 2, "second")
        found = {"four": ranks(first, 2, 4), "four and two": ranks(second, 1, 2)}
        remove_placement_groups([first, second])
        held = create_placement_groups([pin_to_nodes(
            PlacementGroupSpec("held", [{"NPU": 1.0}] * 3, "SPREAD"), list(places), current_nodes())], 20)
        found["partly used"] = ranks(create(2, 6, "six"), 2, 6)
        remove_placement_groups(held)
        report(found)
        """,
    )
    assert found["four"][0] == found["four"][1] == "1", "the driver's node is the first"
    assert found["four"][2] == found["four"][3] != "1"
    assert sorted(found["partly used"]) == list("112233") and len(set(found["partly used"][::2])) == 3
    assert "VRA-255" not in log


def test_groups_that_must_straddle_are_named(cluster: Cluster) -> None:
    found, log = run_on_head(cluster, 'report(ranks(create(4, 8, "eight"), 4, 8))')
    assert len(set(found[:4])) == len(set(found[4:])) == 2, "each on as few nodes as can be"
    assert "VRA-255: 2 of 2 tensor parallel groups are on more than one node" in log
    assert "ranks 0, 1, 2, 3 on 10." in log and "ranks 4, 5, 6, 7 on 10." in log


def test_a_group_of_the_users_own(cluster: Cluster) -> None:
    """Any strategy, and labels: what Ray grants is used, in an order that keeps groups whole."""
    found, log = run_on_head(
        cluster,
        """
        one, two, three = sorted(places, key=places.get)
        labels = [{"ray.io/node-id": node} for node in (two, one, three, two, three, one)]
        group = ray.util.placement_group([{"NPU": 1}] * 6, strategy="SPREAD", bundle_label_selector=labels)
        assert group.wait(20)
        report([ranks(group, 2, 6), ranks(group, 2, 4), [index for index, *_ in rank_bundles(group, config(2, 6))]])
        """,
    )
    six, four, bundles = found
    assert six[:2] == four[:2] == "11" and sorted(six[::2]) == sorted(six[1::2]) == list("123")
    assert six[::2] == six[1::2] and four[2] == four[3]
    assert bundles[:2] == [1, 5] and {tuple(bundles[2:4]), tuple(bundles[4:])} == {(0, 3), (2, 4)}
    assert "VRA-255" not in log


def test_a_node_that_drains_is_left_out_and_named(cluster: Cluster) -> None:
    """The last test of the cluster: one node is busy and drains on, an idle one is gone at once."""
    addresses = [node.address for node in cluster.nodes]
    found, _ = run_on_head(
        cluster,
        f"""
        import subprocess
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
        ids = {{row["NodeManagerAddress"]: row["NodeID"] for row in ray.nodes()}}
        @ray.remote(num_cpus=1)
        class Busy:
            def ready(self):
                return True
        busy = Busy.options(scheduling_strategy=On(ids["{addresses[1]}"], soft=False)).remote()
        ray.get(busy.ready.remote())
        for address in {addresses[1:]!r}:
            subprocess.check_call([sys.executable, "-m", "ray.scripts.scripts", "drain-node",
                "--address={cluster.ray_address}", "--node-id", ids[address],
                "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=600"])
        while sum(row["Alive"] for row in ray.nodes()) > 2:
            time.sleep(0.1)
        found = [npu_wait_s(3), npu_wait_s(4)]
        try:
            require_npus(4, {{"--tensor-parallel-size": 4}})
        except ClusterResourceError as error:
            found.append(str(error))
        found.append([[node.free, node.total, bool(node.note)] for node in free_npus_per_node()])
        report([*found, ranks(create(1, 3), 1, 3)])
        """,
    )
    wait_s, drained_wait_s, error, free, placed = found
    assert (wait_s, drained_wait_s) == (10, 0), "no NPU that drains is waited for"
    assert error.startswith("VRA-258: The engine needs 4 NPUs (--tensor-parallel-size 4), the Ray cluster has 3 (")
    assert f"node {addresses[1]} is draining, to be gone in " in error
    assert f"node {addresses[2]} was drained and is gone (spot)" in error
    assert free == [[3, 3, False], [0, 3, True]]
    assert placed == "111"
