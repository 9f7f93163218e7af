"""The audit on a real cluster: two nodes, and further raylets on the second that were told what is not so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.softnpu.processes import check_python
from vllm_ray_ascend.softnpu.activate import environment
from vllm_ray_ascend.softnpu.cluster import manager, namespaces, processes
from vllm_ray_ascend.softnpu.cluster.plan import Cluster, Shape, node_environment, ray_start_command

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing() is not None, reason=str(namespaces.missing())),
]

NAME = f"audit-{os.getpid()}"
NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
LIMIT_S = 60

PRELUDE = """
import json, logging, ray
logging.basicConfig(format="%(message)s")
from vllm_ray_ascend.cluster.connect import audit_nodes, join, require_npus
from vllm_ray_ascend.cluster.probe import ask, probe
from vllm_ray_ascend.errors import ClusterResourceError
def message(function, *arguments):
    try:
        function(*arguments)
    except ClusterResourceError as error:
        return str(error)
def tell(value):
    print("TOLD" + json.dumps(value))
join()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    settings = {2: {NOSET: "0,1,2", "ASCEND_RT_VISIBLE_DEVICES": "2,3"}}
    made, _ = manager.up(NAME, Shape(npus_per_node=4, cpus_per_node=1), settings=settings)
    yield made
    manager.down(NAME)


def told(cluster: Cluster, code: str) -> tuple[Any, str]:
    """What ``code`` told on the head node, and what it logged."""
    done = subprocess.run(
        manager.node_command(cluster, 1, [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]),
        env=manager.command_environment(cluster, 1, os.environ),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD")]
    assert done.returncode == 0 and lines, done.stdout + done.stderr
    return json.loads(lines[-1].removeprefix("TOLD")), done.stderr


@pytest.fixture
def raylet(cluster: Cluster) -> Iterator[Any]:
    """Starts a further raylet on the second node; its processes end with the test."""
    before = processes.of_cluster(cluster)

    def start(*options: str, **variables: str) -> int:
        node = cluster.node(2)
        known = processes.of_cluster(cluster)
        started = {**node_environment(cluster, node, environment(os.environ)), **variables}
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
        (raylet,) = (pid for pid in processes.of_cluster(cluster) - known if processes.name_of(pid) == "raylet")
        return raylet

    yield start
    for pid in processes.of_cluster(cluster) - before:
        if processes.name_of(pid) == "raylet":
            os.kill(pid, signal.SIGTERM)  # so that it takes leave: Ray finds out about a killed one only after 15 s
            told(cluster, "import time\nwhile sum(row['Alive'] for row in ray.nodes()) > 2: time.sleep(0.1)\ntell(0)")


def test_facts_are_those_of_each_node_without_its_list(cluster: Cluster) -> None:
    facts, _ = told(cluster, "from dataclasses import asdict\ntell(sorted(map(asdict, probe()), key=str))")
    head, other = facts
    assert [(node["hostname"], node["address"]) for node in facts] == [(n.hostname, n.address) for n in cluster.nodes]
    assert (head["visible"], head["noset"]) == (None, None)
    assert (other["visible"], other["noset"]) == ("2,3", "0,1,2")
    for node in facts:
        assert node["cann_devices"] == 4 and node["cann_error"] is None and node["acl_importable"]


def test_a_bad_noset_is_a_warning_told_once(cluster: Cluster) -> None:
    refusal, log = told(cluster, "tell([message(audit_nodes), message(audit_nodes)])")
    assert refusal == [None, None]
    expected = (
        f"node {cluster.node(2).address}: {NOSET}=0,1,2 counts as false since Ray 2.54, which "
        "takes only 1 and true. Workers of this "
        f"engine have 1 all the same; for others: `ray stop` there, then `export {NOSET}=1`, then "
        f"`ray start --address={cluster.ray_address}`."
    )
    assert log.count(expected) == 1
    _, log = told(cluster, f"tell(message(audit_nodes, ['{cluster.node(1).address}']))")
    assert expected not in log


def test_npus_in_use_name_their_holders(cluster: Cluster) -> None:
    text, _ = told(
        cluster,
        """
        group = ray.util.placement_group([{"NPU": 1}] * 5, name="other")
        assert group.wait(20)
        @ray.remote(resources={"NPU": 1}, num_cpus=0)
        class Holder:
            def ready(self): pass
        holder = Holder.remote()
        ray.get(holder.ready.remote())
        tell(message(require_npus, 2, {"--tensor-parallel-size": 2}, 1.0))
        """,
    )
    head, other = (node.address for node in cluster.nodes)
    assert text.startswith(
        "The engine needs 2 NPUs (--tensor-parallel-size 2), the Ray cluster has 6, 0 of them free "
        f"({head}: 0 of 4, {other}: 0 of 2). Held by placement group other ("
    )
    assert "; actors or tasks without a placement group (1 on " in text
    assert text.endswith(
        "Stop what holds them, or lower these sizes; VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer for them."
    )


def test_npus_that_are_given_back_are_waited_for(cluster: Cluster) -> None:
    refusal, _ = told(
        cluster,
        """
        import threading
        group = ray.util.placement_group([{"NPU": 1}] * 6)
        assert group.wait(20)
        threading.Timer(2, ray.util.remove_placement_group, [group]).start()
        tell(message(require_npus, 6, {"--tensor-parallel-size": 6}, 20.0))
        """,
    )
    assert refusal is None


def test_gpus_declared_for_npus(cluster: Cluster, raylet: Any) -> None:
    raylet("--num-gpus=8", PYTHONHASHSEED="1")  # Ray looks at kinds of accelerators in the order of a set
    address = cluster.node(2).address
    finding = (
        f"node {address}: Ray was told of 8 GPUs and of none of its 4 NPUs: with --num-gpus it is chance whether Ray "
        f"looks for NPUs. `ray stop` there, then `ray start --address={cluster.ray_address}`, without --num-gpus."
    )
    (unused, named, short), log = told(
        cluster,
        f"""
        short = message(require_npus, 8, {{"--tensor-parallel-size": 8}}, 0)
        tell([message(audit_nodes), message(audit_nodes, {{"{address}"}}), short])
        """,
    )
    assert unused is None and finding in log, "an engine cannot be placed there, so it is told but not refused"
    assert named == finding
    assert short.startswith("The engine needs 8 NPUs (--tensor-parallel-size 8), the Ray cluster has 6 (")
    assert short.endswith(f").\n{finding}")


def test_more_npus_declared_than_there_are(cluster: Cluster, raylet: Any) -> None:
    raylet('--resources={"NPU": 6}')
    refusal, _ = told(cluster, "tell(message(audit_nodes))")
    assert refusal == (
        f"node {cluster.node(2).address}: Ray was told of 6 NPUs, but 4 of 4 can be used: CANN counts no more. "
        f"`ray stop` there, then `ray start --address={cluster.ray_address}`, without a number of NPUs."
    )


def test_a_node_without_our_package(cluster: Cluster, raylet: Any, tmp_path: Path) -> None:
    (tmp_path / "vllm_ray_ascend").mkdir()
    (tmp_path / "vllm_ray_ascend" / "__init__.py").touch()  # hides ours
    path = manager.command_environment(cluster, 2, os.environ)["PYTHONPATH"]
    raylet('--resources={"NPU": 4}', PYTHONPATH=f"{tmp_path}:{path}")
    refusal, _ = told(cluster, "tell(message(audit_nodes))")
    assert refusal.startswith(f"node {cluster.node(2).address}: vllm-ray-ascend 0.1.0 is not installed there (")
    assert refusal.endswith("`pip install vllm-ray-ascend==0.1.0` there.")


def test_a_node_that_does_not_answer_is_not_waited_for(cluster: Cluster, raylet: Any) -> None:
    stopped = raylet()
    os.kill(stopped, signal.SIGSTOP)
    try:
        answers, _ = told(
            cluster,
            """
            answers = ask({row["NodeID"]: row["NodeManagerAddress"] for row in ray.nodes() if row["Alive"]}, 3)
            tell([len(answers.facts), list(answers.silent.values())])
            """,
        )
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert answers == [2, ["no answer within 3 s"]]


def test_cann_that_fails_is_told_and_not_raised() -> None:
    check_python(
        """
        from vllm_ray_ascend.cluster.node_facts import collect
        facts = collect()
        assert facts.cann_devices is None and "SOFTNPU_DEVICES" in facts.cann_error, facts
        """,
        SOFTNPU_DEVICES="65",
    )


def test_no_cluster_to_join() -> None:
    check_python(
        """
        from vllm_ray_ascend.cluster.connect import join
        from vllm_ray_ascend.errors import ClusterResourceError
        try:
            join("127.0.0.1:1")
        except ClusterResourceError as error:
            assert str(error).startswith("Cannot join a Ray cluster at 127.0.0.1:1 ("), error
            assert str(error).endswith("or give --address=HEAD:6379; `ray start --head` starts one."), error
        else:
            raise SystemExit("joined")
        """
    )
