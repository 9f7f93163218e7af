"""A real cluster of two nodes: made, found again, broken, removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from softnpu.cluster import manager, namespaces, processes, state
from softnpu.cluster.plan import Cluster, Shape, plain_state_dir
from softnpu.errors import ClusterError

pytestmark = pytest.mark.integration

NAME = f"test-{os.getpid()}"
OTHER = f"plain-{os.getpid()}"

MISSING = namespaces.missing_requirement()
needs_namespaces = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

PLACES = """
import json, os, shutil, socket, ray
ray.init(log_to_driver=False)
@ray.remote(resources={"NPU": 1}, num_cpus=0)
class Place:
    def locate(self):
        name = socket.gethostname()
        visible = os.environ["ASCEND_RT_VISIBLE_DEVICES"]
        has_programs = shutil.which("ray") is not None
        return [ray.util.get_node_ip_address(), name, socket.gethostbyname(name), visible, has_programs]
actors = [Place.remote() for _ in range(4)]
places = sorted(ray.get([actor.locate.remote() for actor in actors]))
print(json.dumps({"driver": ray.util.get_node_ip_address(), "places": places}))
"""

# What Ray does to a worker: it is killed, and with it the process that would have removed its shared memory.
LEAK = """
import os
from multiprocessing import resource_tracker, shared_memory
print(shared_memory.SharedMemory(create=True, size=4096).name, flush=True)
os.kill(resource_tracker._resource_tracker._pid, 9)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Made where the environment's programs are not in PATH, as without its activation."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if each != programs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        made, created = manager.up(NAME, Shape(npus_per_node=2, cpus_per_node=1))
    assert created
    yield made
    manager.down(NAME)


def run_on(cluster: Cluster, index: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        manager.node_command(cluster, index, list(command)),
        env=manager.command_environment(cluster, index, os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def traces(cluster: Cluster) -> list[str]:
    """Return what is left of a cluster on the host."""
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout.split()
    left = [f"process {pid}" for pid in processes.find_cluster_processes(cluster)]
    left += [link for link in links if cluster.bridge and link.startswith(cluster.bridge)]
    left += [line for line in Path("/proc/self/mounts").read_text().splitlines() if cluster.directory in line]
    paths = [Path(cluster.directory), state.base_dir() / f"{cluster.name}.json", plain_state_dir(cluster)]
    return left + [str(path) for path in paths if path.exists()]


@needs_namespaces
def test_nodes_are_alive_and_have_their_npus(cluster: Cluster) -> None:
    _, nodes = manager.status(NAME)
    assert [(node.alive, node.npus, node.resources["CPU"]) for node in nodes] == [(True, 2, 1), (True, 2, 1)]
    assert len({node.address for node in nodes}) == 2


@needs_namespaces
def test_a_second_up_finds_it_and_another_shape_is_refused(cluster: Cluster) -> None:
    assert manager.up(NAME, cluster.shape) == (cluster, False)
    with pytest.raises(ClusterError, match=rf"npus per node 2, not 3.*down --name {NAME}"):
        manager.up(NAME, Shape(npus_per_node=3, cpus_per_node=1))


@needs_namespaces
def test_actors_are_spread_over_nodes_that_know_their_own_names(cluster: Cluster) -> None:
    result = run_on(cluster, 2, sys.executable, "-c", PLACES)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    head, other = cluster.nodes
    assert found["driver"] == other.address, "a driver belongs to the node on which it was started"
    assert found["places"] == [
        [node.address, node.hostname, node.address, npu, True] for node in (head, other) for npu in ("0", "1")
    ]


@needs_namespaces
def test_nodes_share_neither_memory_nor_processes(cluster: Cluster) -> None:
    assert run_on(cluster, 1, "touch", "/dev/shm/mine").returncode == 0
    assert run_on(cluster, 2, "test", "-e", "/dev/shm/mine").returncode == 1
    assert not Path("/dev/shm/mine").exists()
    assert run_on(cluster, 1, "pgrep", "-xc", "raylet").stdout == "1\n"


@needs_namespaces
def test_a_node_reaps_its_orphans(cluster: Cluster) -> None:
    assert run_on(cluster, 1, "sh", "-c", "setsid sh -c 'sleep 0.1 & exit 0'").returncode == 0
    time.sleep(0.3)
    assert "Z" not in run_on(cluster, 1, "ps", "--ppid", "1", "-o", "stat=").stdout


@needs_namespaces
def test_exec_hands_on_exit_codes_signals_and_the_working_folder(cluster: Cluster, tmp_path: Path) -> None:
    assert run_on(cluster, 1, "sh", "-c", "exit 7").returncode == 7
    assert run_on(cluster, 1, "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    assert run_on(cluster, 1, "no-such-command").returncode == 127
    script = "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(5)); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        manager.node_command(cluster, 1, [sys.executable, "-c", script]),
        env=manager.command_environment(cluster, 1, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 5


@needs_namespaces
def test_a_killed_raylet_is_noticed_and_started_again_and_down_leaves_nothing(cluster: Cluster) -> None:
    raylets = [pid for pid in processes.find_cluster_processes(cluster) if processes.get_process_name(pid) == "raylet"]
    victim = next(pid for pid in raylets if processes.get_variable(pid, "SOFTNPU_NODE") == cluster.nodes[1].hostname)
    os.kill(victim, signal.SIGKILL)
    while processes.is_alive(victim):
        time.sleep(0.01)
    alive = [node.alive for node in manager.status(NAME)[1]]
    assert alive == [True, False]
    manager.restart_ray(cluster, 2)
    assert all(node.alive for node in manager.status(NAME)[1])
    assert manager.down(NAME)
    assert traces(cluster) == []
    assert not manager.down(NAME), "there is nothing left to remove, and that is no error"
    with pytest.raises(ClusterError, match="there is no cluster"):
        manager.status(NAME)


@needs_namespaces
def test_a_failed_start_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    planned: list[Cluster] = []

    def interrupt(line: str) -> None:
        if line.startswith("starting Ray"):
            planned.append(manager.find_cluster(NAME))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manager.up(NAME, Shape(), report=interrupt)
    assert traces(planned[0]) == []


def test_a_device_that_is_not_there_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,2")
    with pytest.raises(ClusterError, match=r"names '2'.*0 to 1"):
        manager.up(NAME, Shape(npus_per_node=2))
    with pytest.raises(ClusterError, match="there is no cluster"):
        manager.find_cluster(NAME)


def test_nodes_without_namespaces() -> None:
    cluster, _ = manager.up(OTHER, Shape(npus_per_node=2, cpus_per_node=1, kind="plain"))
    try:
        assert [(node.alive, node.npus) for node in manager.status(OTHER)[1]] == [(True, 2), (True, 2)]
        result = run_on(
            cluster, 1, sys.executable, "-c", "import ray; ray.init(); print(ray.cluster_resources()['NPU'])"
        )
        assert result.stdout == "4.0\n", result.stderr
        leak = run_on(cluster, 1, sys.executable, "-c", LEAK)
        assert leak.returncode == -signal.SIGKILL
        segment = Path("/dev/shm") / leak.stdout.strip()
        assert segment.is_file()
    finally:
        manager.down(OTHER)
    assert traces(cluster) == []
    assert not segment.exists()
