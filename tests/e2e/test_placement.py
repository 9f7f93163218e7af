"""Every rank on an NPU of its own, whatever lists the nodes and the driver have; and what happens without the plugin.

The NPU of each rank is read from the device layer, never from our own tables, and those have to agree with it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.options import DemoError
from demo.train.recitation import DENSE, MOE
from tests.e2e.conftest import CONTROL_TOKEN, find_logs_with, run_on_head
from tests.e2e.servers import check_text, check_topology, create_server, opened_npus_by_node, temporary_cluster
from tests.e2e.test_bad_input import check_nothing_left

pytestmark = pytest.mark.multinode

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
DP_RAY = ("--data-parallel-backend", "ray")

START = """
from vllm import LLM
LLM(model={model!r}, dtype="float32", distributed_executor_backend="ray", enforce_eager=True, max_model_len=256,
    kv_cache_memory_bytes=16 << 20, worker_extension_cls="tests.e2e.facts.WorkerFacts"
    ).collective_rpc("facts")
print("STARTED")
"""


def sizes(tp: int, dp: int) -> tuple[str, ...]:
    return ("--tensor-parallel-size", str(tp), "--data-parallel-size", str(dp))


def test_lists_that_differ_between_nodes(tmp_path: Path) -> None:
    """Dense DP 2 x TP 2; the driver has the head's list, as an operator who exports it in one shell has."""
    lists = {1: {VISIBLE: "4,5,6,7"}, 2: {VISIBLE: "0,1,2,3"}}
    arguments = (*sizes(tp=2, dp=2), *DP_RAY, "--data-parallel-size-local", "1")
    with (
        temporary_cluster("e2e-lists", 2, 8, lists) as cluster,
        create_server(cluster, DENSE, tmp_path / "log", *arguments, **{VISIBLE: "4,5,6,7"}) as server,
    ):
        server.wait_until_healthy()
        assert opened_npus_by_node(cluster) == {1: [4, 5], 2: [0, 1]}
        check_text(server, DENSE, 2)
        engines = check_topology(cluster)
        assert [engine["dp_rank"] for engine in engines] == [0, 1]


@pytest.mark.slow
def test_a_head_without_npus_takes_no_rank(tmp_path: Path) -> None:
    """Such as that of a KubeRay cluster; nothing but the number of ranks is given."""
    with (
        temporary_cluster("e2e-bare-head", 3, (0, 1, 1)) as cluster,
        create_server(cluster, DENSE, tmp_path / "log", *sizes(tp=1, dp=2), *DP_RAY) as server,
    ):
        server.wait_until_healthy()
        assert opened_npus_by_node(cluster) == {2: [0], 3: [0]}
        check_text(server, DENSE, 2)
        check_topology(cluster)


@pytest.fixture(scope="module")
def one_list() -> Iterator[Cluster]:
    """Two nodes, a list on the second one's raylet only; Ray hides NPUs from processes without, as older ones do."""
    hide = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    with temporary_cluster("e2e-one-list", 2, 4, {1: hide, 2: {**hide, VISIBLE: "3"}}) as cluster:
        yield cluster


MOE_DP2 = (*sizes(tp=1, dp=2), *DP_RAY, "--data-parallel-size-local", "1", "--enable-expert-parallel")


@pytest.mark.slow  # lists alone: the first test here; experts on several ranks: test_elastic_ep
def test_moe_with_expert_parallelism_and_a_list_on_one_raylet(one_list: Cluster, tmp_path: Path) -> None:
    """The ranks meet at an address that is given by name."""
    address = ("--data-parallel-address", one_list.nodes[0].hostname)
    with create_server(one_list, MOE, tmp_path / "log", *MOE_DP2, *address, HF_TOKEN="hf-secret-5521") as server:
        server.wait_until_healthy()
        assert opened_npus_by_node(one_list) == {1: [0], 2: [3]}
        check_text(server, MOE, 2)
        check_topology(one_list)
    assert not find_logs_with(one_list, f"hf-secret-5521|{CONTROL_TOKEN}", (tmp_path / "log").read_text())
    check_nothing_left(one_list)


@pytest.mark.slow
def test_12942_without_the_plugin(one_list: Cluster, tmp_path: Path) -> None:
    """Ray DP: the engine core's empty list reaches its workers, which then see no NPU at all."""
    with (
        create_server(one_list, MOE, tmp_path / "log", *MOE_DP2, VLLM_RAY_ASCEND="0") as server,
        pytest.raises(DemoError),
    ):
        server.wait_until_healthy()
    assert "AssertionError: Invalid device id" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_drivers_list_is_not_copied_to_workers(one_list: Cluster) -> None:
    """The driver's list names an NPU that Ray did not assign; without the plugin the worker gets that list."""
    code = START.format(model=str(DENSE))
    done = run_on_head(one_list, "-c", code, **{VISIBLE: "2"})
    assert done.returncode == 0 and "STARTED" in done.stdout, done.stderr[-3000:]
    assert f"{VISIBLE}=2 is set here" in done.stdout + done.stderr
    without = run_on_head(one_list, "-c", code, **{VISIBLE: "2", "VLLM_RAY_ASCEND": "0"})
    assert without.returncode != 0
    assert "Physical NPU 0 is not visible here: this process sees physical NPUs 2" in without.stdout + without.stderr


@pytest.mark.slow
def test_the_shortest_command_beside_another_default_route(four_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """Without --data-parallel-size-local each node takes the rank that fits; they meet at Ray's address of the node."""
    head = four_nodes_of_one.nodes[0]

    def run_ip(*commands: str) -> None:
        for command in commands:
            subprocess.run(manager.node_command(four_nodes_of_one, 1, ["ip", *command.split()]), check=True)

    run_ip(
        "link add d0 type veth peer name d1", "link set d1 up", "address add 192.168.50.1/24 dev d0", "link set d0 up"
    )
    run_ip("route replace default dev d0")
    try:
        with create_server(four_nodes_of_one, DENSE, tmp_path / "log", *sizes(tp=1, dp=2), *DP_RAY) as server:
            server.wait_until_healthy()
            assert len(opened_npus_by_node(four_nodes_of_one)) == 2
            check_text(server, DENSE, 2)
    finally:
        run_ip(f"route replace default via {four_nodes_of_one.gateway} src {head.address}", "link delete d0")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["localhost", "[::1]"])
def test_processes_of_an_moe_engine_meet_at_a_name(one_list: Cluster, tmp_path: Path, address: str) -> None:
    arguments = (*sizes(tp=1, dp=2), "--enable-expert-parallel", "--data-parallel-address", address)
    with create_server(one_list, MOE, tmp_path / "log", *arguments) as server:
        server.wait_until_healthy()
        check_text(server, MOE, 2)


@pytest.mark.slow
def test_an_engine_started_on_a_head_without_npus(tmp_path: Path) -> None:
    """Its workers are on the other nodes."""
    with (
        temporary_cluster("e2e-bare-head", 3, (0, 1, 1)) as cluster,
        create_server(cluster, DENSE, tmp_path / "log", *sizes(tp=1, dp=1), "--pipeline-parallel-size", "2") as server,
    ):
        server.wait_until_healthy()
        assert opened_npus_by_node(cluster) == {2: [0], 3: [0]}
        check_text(server, DENSE, 1)


FAILING = """
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

options = dict(model=sys.argv[1], dtype="float32", distributed_executor_backend="ray", enforce_eager=True,
               max_model_len=256, kv_cache_memory_bytes=4 << 30)
parallel = dict(data_parallel_size=2, data_parallel_size_local=1, data_parallel_backend="ray")
left = []
for start in (lambda: LLM(**options), lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(**options, **parallel))):
    try:
        start()
    except Exception as error:
        left.append(type(error).__name__)
    import ray
    from ray._private import state
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        actors = [each["Name"] for each in state.actors().values() if each["State"] != "DEAD"]
        groups = [each["name"] for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
        if not actors and not groups:
            break
        time.sleep(0.2)
    left += [actors, groups]
print("LEFT", json.dumps(left))
"""


@pytest.mark.slow
def test_a_startup_that_fails_leaves_nothing_in_a_driver_that_continues(one_list: Cluster) -> None:
    """Workers run out of memory, after their actors and placement groups were made: one engine, then two."""
    done = run_on_head(one_list, "-X", "faulthandler", "-c", FAILING, str(DENSE))
    found = [line for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    assert found, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-6000:]}"
    error, *left, dp_error, dp_actors, dp_groups = json.loads(found[0].removeprefix("LEFT "))
    assert error and dp_error
    assert [*left, dp_actors, dp_groups] == [[], [], [], []]


SPAN = (*sizes(tp=2, dp=2), *DP_RAY)
PACK = {"VLLM_RAY_DP_PACK_STRATEGY": "span"}


@pytest.fixture(scope="module")
def four_nodes_of_one() -> Iterator[Cluster]:
    """Four nodes with a list of one NPU each: a rank of two workers has to span nodes."""
    with temporary_cluster("e2e-span", 4, 1, {index: {VISIBLE: "0"} for index in (1, 2, 3, 4)}) as cluster:
        yield cluster


@pytest.mark.slow
def test_ranks_that_span_nodes(four_nodes_of_one: Cluster, tmp_path: Path) -> None:
    with create_server(four_nodes_of_one, DENSE, tmp_path / "log", *SPAN, **PACK) as server:
        server.wait_until_healthy()
        assert opened_npus_by_node(four_nodes_of_one) == {1: [0], 2: [0], 3: [0], 4: [0]}
        check_text(server, DENSE, 2)
        for engine in check_topology(four_nodes_of_one):
            assert len({rank["address"] for rank in engine["ranks"]}) == 2


@pytest.mark.slow
def test_2879_without_the_plugin(four_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """A data parallel rank's range is computed over its own node's list, and runs past its end."""
    with (
        create_server(four_nodes_of_one, DENSE, tmp_path / "log", *SPAN, **PACK, VLLM_RAY_ASCEND="0") as server,
        pytest.raises(DemoError),
    ):
        server.wait_until_healthy()
    assert 'local range: [0, 2) base value: "0"' in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def two_nodes_of_eight() -> Iterator[Cluster]:
    with temporary_cluster("e2e-2879", 2, 8) as cluster:
        yield cluster


@pytest.mark.slow
def test_2879_names_sizes_that_fit(two_nodes_of_eight: Cluster, tmp_path: Path) -> None:
    """The issue's sizes over Ray actors, with all four ranks on the first node, as vLLM has it by default."""
    arguments = (*sizes(tp=4, dp=4), *DP_RAY, "--data-parallel-size-local", "4")
    with (
        create_server(
            two_nodes_of_eight, DENSE, tmp_path / "log", *arguments, VLLM_RAY_ASCEND_NPU_WAIT_S="0"
        ) as server,
        pytest.raises(DemoError),
    ):
        server.wait_until_healthy()
    head, second = (node.address for node in two_nodes_of_eight.nodes)
    assert (
        f"VRA-229: Cannot place 4 data parallel ranks of 4 NPUs, 4 on the master {head} (--data-parallel-size 4, "
        f"--data-parallel-size-local 4, VLLM_RAY_DP_PACK_STRATEGY=strict). Free NPUs: {head}: 8 of 8, "
        f"{second}: 8 of 8. The master fits 2 ranks. The request fits with: --data-parallel-size-local 2"
    ) in (tmp_path / "log").read_text()
    check_nothing_left(two_nodes_of_eight)


SCALE_UP = """
import json, sys
from types import SimpleNamespace
import ray
from vllm_ray_ascend.cluster.placement_groups import PlacementGroupSpec, create_placement_groups
from vllm_ray_ascend.cluster.dp_placement import RankPlacement
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.engine.manager import RayAscendEngineActorManager
from vllm_ray_ascend.errors import PlacementError, ShortageError

head, second = sys.argv[1:]
ray.init("auto")
group = ray.util.placement_group
held = [group([{"NPU": 1, "node:" + head: 0.001}] * 5), group([{"NPU": 1, "node:" + second: 0.001}] * 4)]
ray.get([each.ready() for each in held])
manager = object.__new__(RayAscendEngineActorManager)
manager._kind = NPU
manager.placements = [RankPlacement(0, 0, (second,) * 4)]
manager.created_placement_groups = held[1:]
config = SimpleNamespace(instance_id="e", parallel_config=SimpleNamespace(world_size=4, data_parallel_master_ip=head))
def groups():
    return sum(each["state"] != "REMOVED" for each in ray.util.placement_group_table().values())
try:
    manager.add_dp_placement_groups(config, 3)
except ShortageError as error:
    refused = str(error)
before = groups()
added, local_ranks = manager.add_dp_placement_groups(config, 2)
addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
placed = {addresses[node] for node in ray.util.placement_group_table(added[0])["bundles_to_node_id"].values()}
after = groups()
try:
    small = PlacementGroupSpec("small", [{"CPU": 1}], "PACK")
    big = PlacementGroupSpec("big", [{"NPU": 9, "CPU": 1}, {"CPU": 1}], "PACK")
    create_placement_groups([small, big], 5)
except PlacementError as error:
    not_granted = str(error)
print("SCALED", json.dumps([refused, before, sorted(placed), local_ranks, after, not_granted, groups()]))
"""


def test_scale_up_pins_a_rank_to_the_node_of_its_local_rank(two_nodes_of_eight: Cluster) -> None:
    """The second node has local rank 0 already, and NPUs of the first are held by another owner.

    vLLM would take local rank 1 for the first node, from its five NPUs in use, and 1 for the second, unpinned.
    """
    head, second = (node.address for node in two_nodes_of_eight.nodes)
    done = run_on_head(two_nodes_of_eight, "-c", SCALE_UP, head, second)
    found = [line for line in done.stdout.splitlines() if line.startswith("SCALED ")]
    assert found, (done.stdout + done.stderr)[-3000:]
    refused, before, placed, local_ranks, after, not_granted, at_last = json.loads(found[0].removeprefix("SCALED "))
    assert refused == (
        f"VRA-230: Cannot scale from 1 to 3 data parallel ranks of 4 NPUs. Free NPUs: {head}: 3 of 8, {second}: 4 of "
        "8. The nodes fit 1 rank more. 4 NPUs more must be free: stop other engines, add nodes "
        "(`ray start --address=HEAD:PORT`), or "
        'scale to: {"new_data_parallel_size": 2}'
    )
    assert (before, after, at_last) == (2, 3, 3)
    assert not_granted == (
        "VRA-237: Ray did not grant placement group big ({NPU: 9, CPU: 1} + {CPU: 1}, PACK) within 5 s, although all "
        "of it was free a moment before: another engine took it, the nodes lack CPUs, or what is free are parts of "
        "several NPUs. `ray status` and `vllm-ray-ascend topology` show who holds what; start again."
    )
    assert (placed, local_ranks) == ([second], [1])


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_2879(tp: int, tmp_path: Path) -> None:
    """DP 4 over two nodes with NPUs for two ranks each, with the default backend of data parallelism, as in the issue.

    There it was TP 4: sixteen workers, for which this machine needs some minutes.
    """
    npus = list(range(2 * tp))
    variables = {VISIBLE: ",".join(map(str, npus))}
    with (
        temporary_cluster("e2e-dp4", 2, len(npus)) as cluster,
        create_server(cluster, DENSE, tmp_path / "log", *sizes(tp=tp, dp=4), **variables) as server,
    ):
        server.wait_until_healthy()
        assert opened_npus_by_node(cluster) == {1: npus, 2: npus}
        check_text(server, DENSE, 4)
        assert len(check_topology(cluster)) == 4


@pytest.mark.slow
def test_moe_ranks_that_are_processes_stay_on_their_node(tmp_path: Path) -> None:
    """With vLLM's default backend of data parallelism their workers meet at 127.0.0.1."""
    arguments = (*sizes(tp=1, dp=2), "--enable-expert-parallel")
    with (
        temporary_cluster("e2e-moe-mp", 2, 2) as cluster,
        create_server(cluster, MOE, tmp_path / "log", *arguments) as server,
    ):
        server.wait_until_healthy()
        assert opened_npus_by_node(cluster) == {1: [0, 1]}
        check_text(server, MOE, 2)
        check_topology(cluster)
