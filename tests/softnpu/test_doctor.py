"""`vllm-ray-ascend doctor` for real, on two nodes: programs replay recorded machines, healthy ones and faulty ones.

Version files and programs are replaced while the cluster runs; the software NPU counts eight NPUs on each node.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
from softnpu.cluster import manager, namespaces
from softnpu.cluster.plan import Cluster, Shape

from tests.doctor.machine import Machine

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement())),
]

LIMIT_S = 120
PLANTED = "Pl4nted-s3cret"
COMMAND = str(Path(sys.executable).with_name("vllm-ray-ascend"))
LISTENER = "import socket; listener = socket.create_server(('', 61010)); print(flush=True); input()"
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "doctor.schema.json"


class Nodes(NamedTuple):
    """A cluster, and the folder of each of its nodes into which machines are installed."""

    cluster: Cluster
    folders: dict[int, Path]

    def install(self, node: int, *machines: str) -> None:
        shutil.rmtree(self.folders[node], ignore_errors=True)
        Machine(*machines, host=node).install(self.folders[node])

    def doctor(self, *options: str, node: int = 1) -> subprocess.CompletedProcess[str]:
        return self.run("doctor", *options, node=node)

    def run(self, *arguments: str, node: int = 1) -> subprocess.CompletedProcess[str]:
        command = manager.node_command(self.cluster, node, [COMMAND, *arguments])
        environment = manager.command_environment(self.cluster, node, os.environ)
        return subprocess.run(
            command, env=environment, cwd=self.cluster.directory, capture_output=True, text=True, timeout=LIMIT_S
        )

    def findings(self, *options: str) -> tuple[int, list[dict[str, Any]]]:
        done = self.doctor("--json", *options)
        report = json.loads(done.stdout)
        jsonschema.validate(report, json.loads(SCHEMA.read_text()))
        assert report["exit_code"] == done.returncode
        return done.returncode, report["findings"]

    def address(self, node: int) -> str:
        return self.cluster.node(node).address


@contextmanager
def port_in_use(nodes: Nodes, node: int) -> Iterator[None]:
    """Have a program on the node listen on a port of HCCL."""
    command = manager.node_command(nodes.cluster, node, [sys.executable, "-c", LISTENER])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        try:
            yield
        finally:
            listener.kill()


@contextmanager
def two_nodes(folder: str) -> Iterator[Nodes]:
    """Start two nodes whose programs and version files are below ``folder``, with secrets in their variables."""
    folders = {number: Path(folder) / str(number) for number in (1, 2)}
    settings = {
        number: {
            **Machine("a2", host=number).install(path),
            "HF_TOKEN": PLANTED,
            "PIP_INDEX_URL": f"https://me:{PLANTED}-2@index.example/simple",
            "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest",
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
        }
        for number, path in folders.items()
    }
    made, _ = manager.up(f"doctor-{os.getpid()}", Shape(npus_per_node=8, cpus_per_node=1), settings=settings)
    try:
        yield Nodes(made, folders)
    finally:
        manager.down(made.name)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory() as folder, two_nodes(folder) as made:
        yield made


def test_nothing_is_found_on_a_healthy_pair(nodes: Nodes) -> None:
    for node in (1, 2):
        nodes.install(node, "a2")
    done = nodes.doctor()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("vllm-ray-ascend 0.1.0 doctor: 2 nodes, 16 NPUs, ") and first.endswith(" checks (quick)")
    assert others == [
        *(
            f"  {nodes.address(node)} ({nodes.cluster.node(node).hostname}): 8 NPUs Ascend 910B3, driver 25.5.1, "
            "CANN 8.5.1: ok"
            for node in (1, 2)
        ),
        "",
        "OK",
        others[-1],
    ]
    assert others[-1].startswith("Not made: 12 checks of level full, such as ")


def test_a_bundle_has_every_node_and_no_secret(nodes: Nodes, tmp_path: Path) -> None:
    """Secrets are planted in variables of each node's Ray, in a URL there, and in the log of a worker."""
    for node in (1, 2):
        nodes.install(node, "a2")
        (logs,) = nodes.cluster.temp_dir(nodes.cluster.node(node)).glob("session_2*/logs")
        (logs / "worker-planted.err").write_text(
            f"took {PLANTED}\nurl http://me:other-pass@host/\n--api-key some-key\n"
        )
        (logs / "vllm_ray_ascend").mkdir(exist_ok=True)
        record = {"code": "VRA-322", "cause": 'of {"token": "some-key"}', "ranks": []}
        (logs / "vllm_ray_ascend" / "failure-1.000.json").write_text(json.dumps(record))
    done = nodes.run("bundle", "--output", str(tmp_path / "bundle.tar.gz"))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        texts = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    everything = "\n".join(texts.values())
    assert PLANTED not in everything and "other-pass" not in everything and "some-key" not in everything
    for node in (1, 2):
        folder = f"bundle/nodes/{nodes.address(node)}"
        assert texts[f"{folder}/ray/worker-planted.err"] == "took ***\nurl http://***@host/\n--api-key ***\n"
        assert json.loads(texts[f"{folder}/failures/failure-1.000.json"])["code"] == "VRA-322"
        assert f"{folder}/ray/raylet.out" in texts
        assert nodes.address(node) in texts["bundle/doctor.txt"] and nodes.address(node) in texts["bundle/topology.txt"]
    jsonschema.validate(json.loads(texts["bundle/doctor.json"]), json.loads(SCHEMA.read_text()))
    assert len(json.loads(texts["bundle/snapshot.json"])["nodes"]) == 2 and json.loads(texts["bundle/topology.json"])


FIRST = {
    "link-down": "VRA-650",
    "ecc": "VRA-641",
    "alarm": "VRA-640",
    "old-firmware": "VRA-611",
    "flapping": "VRA-659",
    "hot": "VRA-642",
    "board": "VRA-612",
    "no-netdetect": "VRA-655",
}
SECOND = {
    "twin-address": "VRA-652",
    "no-address": "VRA-651",
    "no-gateway": "VRA-653",
    "net-health": "VRA-654",
    "tls-on": "VRA-656",
    "slow-port": "VRA-657",
    "jumbo-port": "VRA-658",
    "crossed-cables": "VRA-663",
    "stranger": "VRA-643",
    "hbm": "VRA-644",
    "other-cann": "VRA-617",
    "old-driver": "VRA-614",
}
"""Machines that are laid over a healthy one, and the finding of each."""
ALSO_OF_SECOND = {"VRA-616", "VRA-677"}
"""Its driver is not that of the first node; and a program has a port of HCCL."""


def test_every_fault_is_found_on_its_node(nodes: Nodes) -> None:
    """Among them one of the host: a program that listens on a port of HCCL."""
    nodes.install(1, *FIRST, "a2")
    nodes.install(2, *SECOND, "a2")
    with port_in_use(nodes, 2):
        code, found = nodes.findings("--level", "full")
    assert code == 2
    for node, expected in ((1, {*FIRST.values()}), (2, {*SECOND.values()} | ALSO_OF_SECOND)):
        assert {finding["code"] for finding in found if finding["address"] == nodes.address(node)} == expected
    assert all(finding["remedy"] and finding["severity"] in ("error", "warning") for finding in found)
    assert {finding["physical_id"] for finding in found if finding["code"] == "VRA-650"} == {3}


def test_one_node_that_lacks_a_tool(nodes: Nodes) -> None:
    nodes.install(1, "alarm", "a2")
    nodes.install(2, "a2-container")
    code, found = nodes.findings("--checks", "health,tls", "--nodes", nodes.cluster.node(2).hostname)
    assert code == 3 and [(each["code"], each["check"]) for each in found] == [("VRA-601", "tls"), ("VRA-623", "")]
    code, found = nodes.findings("--checks", "ecc,tls")
    assert code == 3
    assert {(each["address"], each["check"], each["severity"]) for each in found} == {
        (nodes.address(2), "tls", "unknown")
    }


def test_one_node_without_ray(nodes: Nodes) -> None:
    """Its RoCE ports are looked at, since it may be one of several that do not start."""
    nodes.install(1, "alarm", "link-down", "a2")
    variables = {"PATH": f"{nodes.folders[1] / 'bin'}:{os.environ['PATH']}", "RAY_ADDRESS": "127.0.0.1:1"}
    paths = {"ASCEND_DRIVER_PATH": str(nodes.folders[1] / "driver"), "ASCEND_HOME_PATH": str(nodes.folders[1] / "cann")}
    done = subprocess.run(
        [COMMAND, "doctor", "--local", "--json"],
        env={**os.environ, **variables, **paths},
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)["findings"]
    errors = [each["code"] for each in found if each["severity"] == "error"]
    assert done.returncode == 2 and errors == ["VRA-640", "VRA-650"], found
    assert found[0]["address"] == socket.gethostname() and "VRA-624" in {each["code"] for each in found}


def test_a_model_that_is_missing_and_one_that_is_there(nodes: Nodes, tmp_path: Path) -> None:
    for node in (1, 2):
        nodes.install(node, "a2")
    code, found = nodes.findings("--checks", "clock", "--model", str(tmp_path / "gone"))
    assert code == 2 and [(each["code"], each["address"]) for each in found] == [
        ("VRA-693", nodes.address(1)),
        ("VRA-693", nodes.address(2)),
    ]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    assert nodes.findings("--checks", "clock", "--model", str(tmp_path)) == (0, [])


def test_a_node_that_does_not_exist(nodes: Nodes) -> None:
    done = nodes.doctor("--nodes", "10.99.99.99")
    assert done.returncode == 3 and "VRA-604: No live node of the Ray cluster is 10.99.99.99." in done.stderr


def test_no_cluster_is_unknown() -> None:
    command = [COMMAND, "doctor", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": ""}, capture_output=True, text=True)
    assert done.returncode == 3 and "VRA-227: Cannot join a Ray cluster at 127.0.0.1:1 (" in done.stderr
