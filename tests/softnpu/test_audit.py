"""The audit on a real cluster: two nodes, and further raylets on the second with wrong declarations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.activate import make_environment
from softnpu.cluster import manager, namespaces, processes
from softnpu.cluster.plan import Cluster, Shape, node_environment, ray_start_command

from tests.softnpu.processes import check_python, read_result, run_on_node

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]

NAME = f"audit-{os.getpid()}"
NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
LIMIT_S = 60

PRELUDE = """
import json, logging, ray
logging.basicConfig(format="%(message)s")
from vllm_ray_ascend.cluster.connect import connect_as_observer, require_npus
from vllm_ray_ascend.doctor.before_start import check_cluster, check_nodes
from vllm_ray_ascend.cluster.probe import probe_nodes, probe_cluster
from vllm_ray_ascend.errors import ClusterResourceError
def message(function, *arguments):
    try:
        function(*arguments)
    except ClusterResourceError as error:
        return str(error)
def report(value):
    print("RESULT" + json.dumps(value))
def nodes_at(*addresses):
    return {row["NodeID"] for row in ray.nodes() if row["Alive"] and row["NodeManagerAddress"] in addresses}
connect_as_observer()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    settings = {2: {NOSET: "0,1,2", "ASCEND_RT_VISIBLE_DEVICES": "2,3"}}
    made, _ = manager.up(NAME, Shape(npus_per_node=4, cpus_per_node=1), settings=settings)
    yield made
    manager.down(NAME)


def run_on_head(cluster: Cluster, code: str) -> tuple[Any, str]:
    """Return what ``code`` reports on the head node, and what it logs."""
    done = run_on_node(cluster, 1, PRELUDE + textwrap.dedent(code), limit_s=LIMIT_S)
    return read_result(done), done.stderr


@pytest.fixture
def raylet(cluster: Cluster) -> Iterator[Any]:
    """Starts a further raylet on the second node; its processes end with the test."""
    before = processes.find_cluster_processes(cluster)

    def start(*options: str, **variables: str) -> int:
        node = cluster.node(2)
        known = processes.find_cluster_processes(cluster)
        started = {**node_environment(cluster, node, make_environment(os.environ)), **variables}
        del started["RAY_ADDRESS"]  # `ray start` takes it for the cluster to join
        command = [*ray_start_command([sys.executable, "-m", "ray.scripts.scripts"], cluster, node), *options]
        done = subprocess.run(
            manager.node_command(cluster, 2, command),
            env=started,
            cwd=cluster.directory,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (raylet,) = (
            pid
            for pid in processes.find_cluster_processes(cluster) - known
            if processes.get_process_name(pid) == "raylet"
        )
        return raylet

    yield start
    for pid in processes.find_cluster_processes(cluster) - before:
        if processes.get_process_name(pid) == "raylet":
            os.kill(pid, signal.SIGTERM)  # so that it deregisters: Ray detects a killed one only after 15 s
            run_on_head(
                cluster, "import time\nwhile sum(row['Alive'] for row in ray.nodes()) > 2: time.sleep(0.1)\nreport(0)"
            )


def test_facts_are_those_of_each_node_without_its_list(cluster: Cluster) -> None:
    facts, _ = run_on_head(
        cluster, "from dataclasses import asdict\nreport(sorted(map(asdict, probe_cluster().values()), key=str))"
    )
    head, other = facts
    assert [(node["hostname"], node["address"]) for node in facts] == [(n.hostname, n.address) for n in cluster.nodes]
    assert (head["visible_devices"], head["noset"]) == (None, None)
    assert (other["visible_devices"], other["noset"]) == ("2,3", "0,1,2")
    for node in facts:
        assert node["cann_devices"] == 4 and node["cann_error"] is None and node["acl_importable"]


def test_a_bad_noset_is_a_warning_logged_once(cluster: Cluster) -> None:
    error, log = run_on_head(cluster, "report([message(check_cluster), message(check_cluster)])")
    assert error == [None, None] and log.count("VRA-") == 1, "nothing else is wrong with these nodes"
    expected = (
        f"VRA-212: node {cluster.node(2).address}: {NOSET}=0,1,2 counts as false since Ray 2.54, which "
        "accepts only 1 and true. Workers of engines get 1 all the same. For "
        f"others: `ray stop` there, then `export {NOSET}=1`, then "
        f"`ray start --address={cluster.ray_address}`."
    )
    assert log.count(expected) == 1
    _, log = run_on_head(cluster, f"report(message(check_nodes, nodes_at('{cluster.node(1).address}')))")
    assert expected not in log


def test_npus_in_use_name_their_holders(cluster: Cluster) -> None:
    text, _ = run_on_head(
        cluster,
        """
        group = ray.util.placement_group([{"NPU": 1}] * 5, name="other")
        assert group.wait(20)
        @ray.remote(resources={"NPU": 1}, num_cpus=0)
        class Holder:
            def ready(self): pass
        holder = Holder.remote()
        ray.get(holder.ready.remote())
        report(message(require_npus, 2, {"--tensor-parallel-size": 2}, 1.0))
        """,
    )
    head, other = (node.address for node in cluster.nodes)
    assert text.startswith(
        "VRA-244: The engine needs 2 NPUs (--tensor-parallel-size 2), the Ray cluster has 6, 0 of them free "
        f"({head}: 0 of 4, {other}: 0 of 2). Held by placement group other ("
    )
    assert "; actors or tasks without a placement group (1 on " in text
    assert text.endswith(
        "Stop what holds them, or lower these sizes; VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer for them."
    )


def test_waits_for_npus_that_are_given_back(cluster: Cluster) -> None:
    error, _ = run_on_head(
        cluster,
        """
        import threading
        group = ray.util.placement_group([{"NPU": 1}] * 6)
        assert group.wait(20)
        threading.Timer(2, ray.util.remove_placement_group, [group]).start()
        report(message(require_npus, 6, {"--tensor-parallel-size": 6}, 20.0))
        """,
    )
    assert error is None


def test_gpus_declared_for_npus(cluster: Cluster, raylet: Any) -> None:
    raylet("--num-gpus=8", PYTHONHASHSEED="1")  # Ray looks at kinds of accelerators in the order of a set
    address = cluster.node(2).address
    finding = (
        f"VRA-201: node {address}: it declares 8 GPUs and none of its 4 NPUs to Ray: with --num-gpus Ray may or may "
        f"not detect NPUs. `ray stop` there, then `ray start --address={cluster.ray_address}`, without "
        f"--num-gpus."
    )
    (unused, named, short), log = run_on_head(
        cluster,
        f"""
        short = message(require_npus, 8, {{"--tensor-parallel-size": 8}}, 0)
        there = [row for row in ray.nodes() if row["NodeManagerAddress"] == "{address}" and row["Alive"]]
        node_id = next(row["NodeID"] for row in there if "GPU" in row["Resources"])  # there is the first raylet too
        report([message(check_cluster), message(check_nodes, {{node_id}}), short])
        """,
    )
    assert unused is None and finding in log, "an engine cannot be placed there, so it is logged and no error"
    assert named == f"VRA-217: The engine cannot start on these nodes:\n{finding}"
    assert short.startswith("VRA-239: The engine needs 8 NPUs (--tensor-parallel-size 8), the Ray cluster has 6 (")
    assert short.endswith(f").\n{finding}")


def test_what_doctor_would_say_is_a_warning(cluster: Cluster, raylet: Any) -> None:
    """Nodes are compared where the engine spans them, in what workers do not get from the driver."""
    raylet(HCCL_BUFFSIZE="512", HCCL_DETERMINISTIC="true")
    address = cluster.node(2).address
    error, log = run_on_head(cluster, "report(message(check_cluster))")
    assert error is None and "VRA-678" not in log
    addresses = [node.address for node in cluster.nodes]
    error, log = run_on_head(cluster, f"report(message(check_nodes, nodes_at(*{addresses})))")
    assert error is None and f"VRA-678: node {address}: HCCL_DETERMINISTIC is 'true' where Ray was started there" in log
    assert f"VRA-678: node {address}: HCCL_BUFFSIZE is '512' where Ray was started there" in log
    error, log = run_on_head(
        cluster,
        f"import os\nos.environ['HCCL_DETERMINISTIC'] = 'true'\nreport(message(check_nodes, nodes_at(*{addresses})))",
    )
    assert error is None and "HCCL_DETERMINISTIC is" not in log and "HCCL_BUFFSIZE is" in log


def test_more_npus_declared_than_there_are(cluster: Cluster, raylet: Any) -> None:
    raylet('--resources={"NPU": 6}')
    error, _ = run_on_head(cluster, "report(message(check_cluster))")
    assert error == (
        "VRA-217: The engine cannot start on these nodes:\n"
        f"VRA-206: node {cluster.node(2).address}: it declares 6 NPUs to Ray, but 4 of 4 are usable: CANN counts no "
        f"more. `ray stop` there, then `ray start --address={cluster.ray_address}`, without NPU in --resources."
    )


def test_a_node_without_our_package(cluster: Cluster, raylet: Any, tmp_path: Path) -> None:
    (tmp_path / "vllm_ray_ascend").mkdir()
    (tmp_path / "vllm_ray_ascend" / "__init__.py").touch()  # hides ours
    path = manager.command_environment(cluster, 2, os.environ)["PYTHONPATH"]
    raylet('--resources={"NPU": 4}', PYTHONPATH=f"{tmp_path}:{path}")
    error, _ = run_on_head(cluster, "report(message(check_cluster))")
    line = f"VRA-215: node {cluster.node(2).address}: vllm-ray-ascend 0.1.0 is not installed there ("
    assert error.splitlines()[1].startswith(line)
    assert error.endswith("`pip install vllm-ray-ascend==0.1.0` there.")


def test_a_node_that_does_not_answer_is_not_waited_for(cluster: Cluster, raylet: Any) -> None:
    stopped = raylet()
    os.kill(stopped, signal.SIGSTOP)
    try:
        answers, _ = run_on_head(
            cluster,
            """
            answers = probe_nodes({row["NodeID"]: row["NodeManagerAddress"] for row in ray.nodes() if row["Alive"]}, 20)
            report([len(answers.facts), list(answers.failures.values())])
            """,
        )
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert answers == [2, ["no answer within 20 s"]]


def test_cann_that_fails_is_reported_and_not_raised() -> None:
    check_python(
        """
        from vllm_ray_ascend.cluster.node_facts import collect_node_facts
        facts = collect_node_facts()
        assert facts.cann_devices is None and "SOFTNPU_DEVICES" in facts.cann_error, facts
        """,
        SOFTNPU_DEVICES="65",
    )


def test_no_cluster_to_join() -> None:
    check_python(
        """
        from vllm_ray_ascend.cluster.connect import connect_as_observer
        from vllm_ray_ascend.errors import ClusterResourceError
        try:
            connect_as_observer("127.0.0.1:1")
        except ClusterResourceError as error:
            assert str(error).startswith("VRA-227: Cannot join a Ray cluster at 127.0.0.1:1 ("), error
            assert str(error).endswith("or give --address=HEAD:6379; `ray start --head` starts one."), error
        else:
            raise SystemExit("joined")
        """
    )
