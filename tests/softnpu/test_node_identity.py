"""Nodes that share an address, as containers of one host; a head without NPUs; names in place of addresses."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import manager, namespaces
from softnpu.cluster.plan import Cluster, Shape

from tests.softnpu.processes import read_result, run_on_node

pytestmark = pytest.mark.integration

ROOT = str(Path(__file__).resolve().parents[2])
LIMIT_S = 180

PRELUDE = """
import json, logging, os, sys, ray
from types import SimpleNamespace
logging.basicConfig(format="%(message)s")
from vllm_ray_ascend.cluster.connect import connect_as_observer, require_npus
from vllm_ray_ascend.doctor.before_start import check_cluster, check_nodes
from vllm_ray_ascend.cluster.dp_placement import plan_placement
from vllm_ray_ascend.cluster.placement_groups import *
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims_of_engine, publish_record
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.owners import check_claims
from vllm_ray_ascend.engine import data_parallel, manager
from vllm_ray_ascend.errors import VllmRayAscendError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In
connect_as_observer(os.environ.get("OBSERVED", "auto"))
def config(dp, local, world=1, address="127.0.0.1"):
    return SimpleNamespace(
        data_parallel_size=dp, data_parallel_size_local=local, world_size=world, tensor_parallel_size=world,
        all2all_backend="", data_parallel_master_ip=address, ray_runtime_env=None, data_parallel_backend="ray")
def report(value):
    print("RESULT" + json.dumps(value))
"""


@pytest.fixture(scope="module")
def containers() -> Iterator[Cluster]:
    name = f"containers-{os.getpid()}"
    made, _ = manager.up(name, Shape(nodes=2, npus_per_node=1, cpus_per_node=3, kind="plain"))
    yield made
    manager.down(name)


@pytest.fixture(scope="module")
def bare_head() -> Iterator[Cluster]:
    if reason := namespaces.missing_requirement():
        pytest.skip(reason)
    name = f"bare-{os.getpid()}"
    made, _ = manager.up(name, Shape(nodes=2, npus_per_node=2, cpus_per_node=3, npus_of_nodes=(0, 2)))
    yield made
    manager.down(name)


def run_on(cluster: Cluster, node: int, code: str, *arguments: str, **variables: str) -> tuple[Any, str]:
    """Return what ``code`` reports on a node, and what it writes."""
    variables = {"PYTHONPATH": ROOT, **variables}
    done = run_on_node(cluster, node, PRELUDE + textwrap.dedent(code), *arguments, limit_s=LIMIT_S, **variables)
    return read_result(done), done.stdout + done.stderr


def test_containers_of_one_host_each_have_an_npu_0(containers: Cluster) -> None:
    """Two data parallel ranks go to two nodes of one address; their claims differ, and the topology shows both."""
    found, log = run_on(
        containers,
        1,
        """
        settings = config(2, 2)
        data_parallel.complete(settings, False, True, is_moe=True)
        request = data_parallel.placement_request(settings, NPU, is_moe=True)
        ranks = plan_placement(request, free_npus_per_node())
        groups = create_placement_groups(
            manager.wanted_groups(SimpleNamespace(instance_id="e"), ranks, NPU), 30)
        @ray.remote(num_cpus=0, resources={"NPU": 1})
        class Worker:
            def place(self):
                context = ray.get_runtime_context()
                return context.get_node_id(), int(context.get_accelerator_ids()["NPU"][0])
        workers = [
            Worker.options(name=f"w{i}", scheduling_strategy=In(group, placement_group_bundle_index=0)).remote()
            for i, group in enumerate(groups)]
        placed = ray.get([worker.place.remote() for worker in workers])
        own = ray.get_runtime_context().get_node_id()
        records = [
            EngineRecord(
                engine=f"e{i}", dp_rank=0, model="zen", address="127.0.0.1", pid=1, group=group.id.hex(), share=1.0,
                started=0.0, node_id=own, ranks=(RankRecord(
                    rank=0, local_rank=0, address="127.0.0.1", visible_index=0, physical_id=npu, bundle_index=0,
                    pid=i, actor_name=f"w{i}", node_id=node),))
            for i, (group, (node, npu)) in enumerate(zip(groups, placed))]
        check_claims([claim for record in records for claim in claims_of_engine(record)])
        for record in records:
            publish_record(record)
        check_nodes({node for node, _ in placed})
        import subprocess
        text = subprocess.run(
            [sys.executable, "-m", "vllm_ray_ascend.cli.main", "topology", "--json"], text=True, capture_output=True)
        found = [settings.data_parallel_size_local, settings.data_parallel_master_ip, own, placed]
        report([*found, json.loads(text.stdout)])
        """,
    )
    local_size, master, own, placed, topology = found
    assert local_size == 1 and {node["address"] for node in topology["nodes"]} == {master}
    assert len({node for node, _ in placed}) == 2 and placed[0][0] == own, "the first rank is on the driver's node"
    assert [npu for _, npu in placed] == [0, 0]
    owners = {node["node"]: [owner["engine"] for owner in node["npus"][0]["owners"]] for node in topology["nodes"]}
    assert owners == {placed[0][0]: ["e0"], placed[1][0]: ["e1"]}
    assert "VRA-2" not in log


def test_a_head_without_npus(bare_head: Cluster) -> None:
    """It is no finding; an engine's NPUs are those of the others; data parallel ranks have to be started there."""
    found, log = run_on(
        bare_head,
        1,
        """
        check_cluster()
        require_npus(2, {"--tensor-parallel-size": 2})
        settings = config(2, 2)
        data_parallel.complete(settings, False, True, is_moe=True)
        try:
            plan_placement(data_parallel.placement_request(settings, NPU, is_moe=True), free_npus_per_node())
        except VllmRayAscendError as error:
            report([settings.data_parallel_master_ip, str(error)])
        """,
    )
    head, other = (node.address for node in bare_head.nodes)
    master, refused = found
    assert master == head
    assert f"Free NPUs: {head}: 0 of 0, {other}: 2 of 2. The master fits 0 ranks." in refused
    assert f"`vllm serve` run on {other}" in refused
    assert "VRA-20" not in log and "VRA-21" not in log


def slow(value: str) -> Any:
    """Return a value of a test that is in `make test-matrix` only."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("form", ["{head}", slow("{address}"), slow("{head}:6379")])
def test_the_cluster_is_found_by_name(bare_head: Cluster, form: str) -> None:
    head = bare_head.nodes[0]
    address = form.format(head=head.hostname, address=head.address)
    found, _ = run_on(bare_head, 2, "report(len(ray.nodes()))", OBSERVED=address)
    assert found == 2


@pytest.fixture(scope="module")
def second_interface(bare_head: Cluster) -> str:
    """The address of another interface of the second node, over which its default route leads."""
    for command in (
        "link add d0 type veth peer name d1",
        "address add 192.168.50.1/24 dev d0",
        "link set d0 up",
        "link set d1 up",
        "route replace default dev d0",
    ):
        subprocess.run(manager.node_command(bare_head, 2, ["ip", *command.split()]), check=True)
    return "192.168.50.1"


@pytest.mark.parametrize(
    "form", ["{host}", *map(slow, ["localhost", "{address}", "[::1]"]), "", slow("{second_interface}")]
)
def test_the_ranks_meet_at_an_address_of_the_node(bare_head: Cluster, second_interface: str, form: str) -> None:
    """However it is given, and whatever the default route is."""
    node = bare_head.nodes[1]
    given = form.format(host=node.hostname, address=node.address, second_interface=second_interface)
    found, _ = run_on(
        bare_head,
        2,
        """
        from vllm.utils.network_utils import get_ip
        settings = config(2, 2, address=sys.argv[1] or get_ip())
        data_parallel.complete(settings, bool(sys.argv[1]), True, is_moe=True)
        request = data_parallel.placement_request(settings, NPU, is_moe=True)
        ranks = plan_placement(request, free_npus_per_node())
        report([get_ip(), settings.data_parallel_master_ip, [rank.bundle_addresses[0] for rank in ranks]])
        """,
        given,
    )
    assert found == [second_interface, given if given == second_interface else node.address, [node.address] * 2]


def test_an_address_of_another_node_is_refused(bare_head: Cluster) -> None:
    head, other = bare_head.nodes
    found, _ = run_on(
        bare_head,
        2,
        """
        try:
            data_parallel.complete(config(2, 2, address=sys.argv[1]), True, True, is_moe=True)
        except VllmRayAscendError as error:
            report(str(error))
        """,
        head.hostname,
    )
    assert found.startswith("VRA-283: ") and f"is Ray's node {head.address}, not this one" in found
    assert f"which Ray knows as {other.address}" in found


def test_allowed_nodes_may_be_named(bare_head: Cluster) -> None:
    head, other = bare_head.nodes
    found, _ = run_on(
        bare_head,
        1,
        "report(sorted(data_parallel.allowed_addresses()))",
        VLLM_RAY_DP_PLACEMENT_NODE_IPS=f"{other.hostname}, {head.address}",
    )
    assert found == sorted([head.address, other.address])
