"""What is collected on this machine, whatever it is: commands, files, permissions, processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.doctor.machine import Machine
from vllm_ray_ascend.cli.doctor import _demand
from vllm_ray_ascend.cluster.node_facts import STUCK
from vllm_ray_ascend.cluster.probe import Answer, NodeAnswers
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.doctor import collect, gather
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.collect import (
    collect_as_dict,
    collect_record,
    decode_record,
    run_command,
)
from vllm_ray_ascend.doctor.host_addresses import host_addresses, route_targets
from vllm_ray_ascend.doctor.queries import (
    ADDRESS,
    ERRORS,
    HEALTH,
    LINK,
    LIST,
    PROCESSES,
    ROUTES,
    SERVE_LLM,
    model_command,
)
from vllm_ray_ascend.doctor.records import Holder, ModelFiles, Output, Route
from vllm_ray_ascend.doctor.routes import decode_routes, routes_as_dict

pytestmark = pytest.mark.unit


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs and files of a recorded A2 node, on PATH and in the environment."""
    for name, value in Machine("a2").install(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.usefixtures("machine")
def test_a_record_survives_its_journey_as_json() -> None:
    values = json.loads(json.dumps(collect_as_dict("127.0.0.1", [LINK.command, PROCESSES.command], [], 120.0)))
    found = decode_record({**values, "of_a_later_version": 1})
    assert len(found.facts.dies) == 8 and len(found.outputs) == 1 + 2 * 8
    assert found.outputs[LINK.line(found.facts.dies[3])] == Output(0, "link status: UP\n")
    assert "Version=25.5.1" in (found.files["driver"] or "") and "version=8.5.1" in (found.files["cann"] or "")
    assert found.limits["Max open files"].soft and found.user and found.shared_memory
    assert found.mtu and 0 < found.started <= found.ended <= time.time()


def test_the_same_as_the_recorded_machine(machine: Path) -> None:
    """The fake programs answer as `Machine.run`, so that tests of checks and of the command see one machine."""
    commands = [query.command for query in (HEALTH, ADDRESS, ERRORS)]
    outputs = collect_record("127.0.0.1", commands, limit_s=120).outputs
    recorded = Machine("a2").record().outputs
    assert len(outputs) == 1 + 4 * 8 and outputs == {line: recorded[line] for line in outputs}


def test_who_listens_on_a_port_of_hccl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(collect, "read_first_port", lambda: port)
        holders = collect_record("127.0.0.1", []).port_holders
    name = Path("/proc/self/comm").read_text().strip()
    assert holders[port] == f"{name} (pid {os.getpid()})" and min(holders) == port


def test_commands_of_a_later_version_are_left_out(machine: Path) -> None:
    assert set(collect_record("", ["npu-smi info -t magic -i {card}"]).outputs) == {LIST}


def test_tools_that_are_missing_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    soon = time.monotonic() + 1
    assert run_command("hccn_tool -i 0 -link -g", tmp_path, soon) == Output(None, "hccn_tool is not there")
    program(tmp_path, "npu-smi", "exec sleep 60")
    assert run_command("npu-smi info -m", tmp_path, soon) == Output(None, "npu-smi gave no answer in time")
    program(tmp_path, "npu-smi", "echo out; echo err >&2; exit 3")
    assert run_command("npu-smi info -m", tmp_path, time.monotonic() + 30) == Output(3, "out\nerr\n")
    program(tmp_path, "npu-smi", "")
    (tmp_path / "npu-smi").write_text("#!/no/such/shell\n")
    assert run_command("npu-smi info", tmp_path, time.monotonic() + 30).code is None


@pytest.fixture
def undead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on PATH for programs that write their ids to ``pids`` there, and that nobody can kill until the end."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    yield tmp_path
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


def test_a_program_that_waits_in_the_driver_is_left_there(undead: Path) -> None:
    program(undead, "npu-smi", f"echo $$ >> {undead}/pids; echo some; exec sleep 60")
    started = time.monotonic()
    assert run_command("npu-smi info -m", undead, started + 1) == Output(None, f"npu-smi {STUCK}")
    found = collect_record("127.0.0.1", [HEALTH.command], limit_s=1)
    assert time.monotonic() - started < 30
    assert found.outputs == {LIST: Output(None, f"npu-smi {STUCK}")} and found.limits and found.mtu


def test_a_program_whose_child_keeps_its_output_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "npu-smi", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    found = run_command("npu-smi info -m", tmp_path, time.monotonic() + 1)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert found == Output(None, "npu-smi gave no answer in time")


def test_nothing_is_started_when_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for its own end."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "npu-smi", f"touch {tmp_path}/started")
    found = run_command("npu-smi info -m", tmp_path, time.monotonic() - 1)
    assert found == Output(None, "npu-smi was not run, since no time was left") and not (tmp_path / "started").exists()


def test_a_device_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").write_text("")
    answered = threading.Event()
    monkeypatch.setattr(collect, "_open_error", lambda path: answered.wait() and "")
    try:
        found = collect_record("127.0.0.1", [], limit_s=2, root=tmp_path)
    finally:
        answered.set()
    assert found.devices["davinci0"].error == "no answer in time" and found.mtu


def test_npu_smi_lists_the_npus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "npu-smi", f'echo "$*" >> {tmp_path}/calls; echo failed >&2; exit 3')
    assert collect_record("127.0.0.1", []).outputs == {LIST: Output(3, "failed\n")}
    assert (tmp_path / "calls").read_text() == "info -m\n"


def test_what_serve_llm_imports_is_read_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "names_missing_here", lambda: ["vllm.a.b"])
    assert collect_record("127.0.0.1", []).serve_llm_lacks == [], "before each start of an engine"
    _, commands = _demand([CHECKS["serve-llm"]])
    assert commands == [SERVE_LLM]
    assert collect_record("127.0.0.1", commands).serve_llm_lacks == ["vllm.a.b"]


def test_files_that_variables_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_WHITELIST_FILE", str(tmp_path / "list.json"))
    assert collect_record("127.0.0.1", []).missing_files == ["HCCL_WHITELIST_FILE"]
    (tmp_path / "list.json").write_text("{}")
    assert collect_record("127.0.0.1", []).missing_files == []


def test_a_resolver_that_does_not_answer_costs_the_own_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait() and [])
    monkeypatch.setenv("VLLM_RAY_ASCEND_NODE_ENV", "off")
    try:
        found = collect_record("127.0.0.1", [], limit_s=2)
    finally:
        answered.set()
    assert found.own_addresses == [] and found.limits and found.mtu


def test_hccn_tool_is_found_in_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "tools").mkdir()
    program(tmp_path / "tools", "hccn_tool", 'echo "link status: UP"')
    assert run_command("hccn_tool -i 0 -link -g", tmp_path, time.monotonic() + 30).text == "link status: UP\n"


def test_files_below_another_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_DRIVER_PATH", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    for path, text in {
        "etc/ascend_install.info": "Driver_Install_Path_Param=/opt/npu\n",
        "opt/npu/driver/version.info": "Version=1\n",
        "opt/npu/firmware/version.info": "Version=2\n",
        "usr/local/Ascend/cann-8.5.1/aarch64-linux/ascend_toolkit_install.info": "version=8.5.1\n",
        "usr/local/Ascend/nnal/atb/8.5.1/version.info": "x",
        "dev/davinci_manager": "",
        "dev/davinci0": "",
        "dev/davinci_other": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = collect_record("", [], root=tmp_path)
    assert (found.files["driver"], found.files["firmware"], found.files["cann"]) == (
        "Version=1\n",
        "Version=2\n",
        "version=8.5.1\n",
    )
    assert found.cann_home.endswith("/usr/local/Ascend/cann-8.5.1") and len(found.nnal) == 1
    assert set(found.devices) == {"davinci_manager", "davinci0"}
    assert found.devices["davinci0"].error == "" and found.devices["davinci0"].uid == os.geteuid()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES])
def test_why_a_device_cannot_be_opened(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").write_text("")

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    assert collect._device_files(tmp_path, collect._open_error)["davinci0"].error == errno.errorcode[code]


def test_secrets_are_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "VLLM_API_KEY", "HF_TOKEN", "MY_VARIABLE"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("HCCL_TEST", "http://me:planted@proxy")
    values = collect_as_dict("", [], [], 20.0)
    assert values["environment"]["RAY_AUTH_MODE"] == "token" and "planted" not in json.dumps(values)


def test_processes_that_have_an_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    stranger = collect._holder(os.getpid())
    assert stranger is not None and "pytest" in stranger.command and not stranger.of_ray
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getppid()))
    child = collect._holder(os.getpid())
    assert child is not None and child.of_ray
    assert collect._holder(2**22 + 1) is None


@contextmanager
def running(command: list[str], env: dict[str, str] | None = None) -> Iterator[int]:
    """Run a command that prints a line first: before that, /proc may still show no environment and no name of it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        yield process.pid
        process.kill()


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[int]:
    """The id of a process by the name of a raylet."""
    program(tmp_path, "raylet", "echo started; read line")
    with running([str(tmp_path / "raylet")]) as pid:
        yield pid


def holder_started_by(raylet: int) -> Holder:
    """Return what is collected of a process that this raylet started, and that is nobody's child any more."""
    waits = [sys.executable, "-c", "print('started', flush=True); input()"]
    with running(waits, {"RAY_RAYLET_PID": str(raylet)}) as pid:
        found = collect._holder(pid)
    assert found is not None
    return found


def test_what_an_earlier_ray_left_is_not_of_ray(raylet: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    living, dead, another = (holder_started_by(pid) for pid in (raylet, 2**22 + 1, os.getpid()))
    assert (living.of_ray, living.leftover) == (True, False)
    assert (dead.of_ray, dead.leftover) == (False, True)
    assert (another.of_ray, another.leftover) == (False, True), "its id is that of another process now"
    monkeypatch.setenv("RAY_RAYLET_PID", "12345")
    assert holder_started_by(12345).of_ray, "this node's own"


def test_peers_that_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reachable = f"127.0.0.1:{listener.getsockname()[1]}"
        assert collect._unreachable([reachable, "127.0.0.1:1"]) == {"127.0.0.1:1": "Connection refused"}
    assert collect._unreachable([]) == {}


def test_routes_and_interfaces_on_demand() -> None:
    assert collect_record("127.0.0.1", []).interfaces == []
    assert ("lo", "127.0.0.1") in collect_record("127.0.0.1", [ROUTES]).interfaces
    found = routes_as_dict(["127.0.0.1", "::1", "10.0.0.256"], ["127.0.0.1", "192.0.2.77"])
    routes = decode_routes(json.loads(json.dumps(found)))
    assert routes["127.0.0.1"] == Route("127.0.0.1", leaving={"127.0.0.1": "lo"})
    assert routes["::1"].leaving == {}, "of the other family"
    assert not routes["10.0.0.256"].source and routes["10.0.0.256"].error


def test_why_there_are_no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def run(
        function: object, decode: object, arguments: dict[str, tuple[list[str], ...]], limit_s: float
    ) -> NodeAnswers:
        asked.update(arguments)
        return NodeAnswers({"a": Answer({"10.0.0.2": Route("10.0.0.1")}, 0.0, 0.0)}, {"b": "TypeError: no"})

    monkeypatch.setattr(gather, "run_on_nodes", run)
    found = gather._with_routes({name: Machine("a2", host=host).record() for host, name in enumerate("ab", 1)}, 1.0)
    assert asked == {"a": (["10.0.0.2"], ["10.0.0.1"]), "b": (["10.0.0.1"], ["10.0.0.2"])}
    assert [(each.routes, each.routes_error) for each in found.values()] == [
        ({"10.0.0.2": Route("10.0.0.1")}, ""),
        ({}, "TypeError: no"),
    ]


def test_a_control_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise TimeoutError("Timed out while waiting for GCS")

    monkeypatch.setattr(gather, "running_engines", wait)
    assert gather._engines() is None


def test_npus_of_which_several_ranks_have_parts() -> None:
    def engine(share: float, key: str, *places: tuple[str, int]) -> EngineRecord:
        ranks = [
            RankRecord(
                rank=rank, local_rank=0, address="10.0.0.1", visible_index=0, physical_id=npu, bundle_index=0, pid=1,
                actor_name=f"{rank}", node_id=node,
            )
            for rank, (node, npu) in enumerate(places)
        ]  # fmt: skip
        return EngineRecord(
            engine="e", dp_rank=0, model="m", address="10.0.0.1", pid=1, group="g", share=share, started=0.0,
            ranks=tuple(ranks), device_key=key,
        )  # fmt: skip

    engines = [
        engine(0.5, "NPU", ("a", 3), ("b", 4)),
        engine(0.5, "NPU", ("a", 3), ("a", 1)),
        engine(1.0, "NPU", ("a", 2)),
        engine(0.5, "GPU", ("a", 0)),
    ]
    node = NodeResources("10.0.0.1", npus=8, gpus=0, node_id="a")
    assert gather._shared_physical_ids(node, engines) == [3]


def test_routes_are_asked_for_where_other_hosts_are() -> None:
    first, second = (Machine("a2", host=host).record() for host in (1, 2))
    assert route_targets([first, second]) == [["10.0.0.2"], ["10.0.0.1"]]
    own = {**second.environment, "HCCL_SOCKET_IFNAME": "eth1,ens", "GLOO_SOCKET_IFNAME": "none"}
    assert route_targets([first, replace(second, environment=own)]) == [["10.0.0.2", "10.1.0.2"], ["10.0.0.1"]]
    named = replace(first, environment={"VLLM_HOST_IP": "node-1", "HCCL_IF_IP": "10.1.0.1"})
    assert set(host_addresses(named)) == {"HCCL", "gloo"} and host_addresses(named)["HCCL"].interface == "eth1"
    assert route_targets([first]) == [[]] and route_targets([]) == []


@pytest.mark.parametrize(
    ("variables", "user", "address", "interface"),
    [
        ({"VLLM_HOST_IP": "[fd00::1]"}, "vLLM", "fd00::1", "eth0"),
        ({"VLLM_HOST_IP": "fe80::1%eth0"}, "vLLM", "fe80::1", "eth0"),
        ({"HCCL_SOCKET_IFNAME": "eth0"}, "HCCL", "10.0.0.1", "eth0"),
        ({"HCCL_SOCKET_IFNAME": "eth0", "HCCL_SOCKET_FAMILY": "AF_INET6"}, "HCCL", "fd00::1", "eth0"),
        ({"HCCL_SOCKET_IFNAME": "eth1", "HCCL_SOCKET_FAMILY": "AF_INET6"}, "HCCL", "10.1.0.1", "eth1"),
        ({"HCCL_SOCKET_IFNAME": "eth2"}, "HCCL", "", ""),  # link-local only
        ({"HCCL_SOCKET_IFNAME": "^docker"}, "HCCL", "10.0.0.1", "eth0"),
        ({"HCCL_SOCKET_IFNAME": "^docker,usb,eth"}, "HCCL", "127.0.0.1", "lo"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "gloo", "fd00::1", "eth0"),
    ],
)
def test_which_address_is_chosen(variables: dict[str, str], user: str, address: str, interface: str) -> None:
    interfaces = [
        ("lo", "127.0.0.1"), ("usb0", "169.254.3.1"), ("eth0", "fe80::1%eth0"), ("eth0", "fd00::1"),
        ("eth0", "10.0.0.1"), ("eth1", "10.1.0.1"), ("eth2", "fe80::2%eth2"), ("docker0", "172.17.0.1"),
    ]  # fmt: skip
    node = replace(Machine("a2").record(), address="fd00::1", interfaces=interfaces, environment=variables)
    chosen = host_addresses(node)[user]
    assert (chosen.address, chosen.interface) == (address, interface)
    assert chosen.is_target is (address not in ("", "fe80::1"))


def model(folder: Path, **sizes: int) -> str:
    """Write a model of two files with weights below ``folder``, and return its path."""
    for name, size in {"a.safetensors": 30, "b.safetensors": 12, **sizes}.items():
        (folder / name).write_bytes(bytes(size))
    (folder / "config.json").write_text("{}")
    weights = {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}
    index = {"metadata": {"total_size": 40}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def files_of_model(path: str) -> ModelFiles:
    values = json.loads(json.dumps(collect_as_dict("127.0.0.1", [model_command(path)], [], 20.0)))
    found = decode_record(values).model
    assert found is not None
    return found


def test_files_of_a_model(tmp_path: Path) -> None:
    assert collect_record("127.0.0.1", []).model is None
    found = files_of_model(model(tmp_path, **{"training.bin": 7}))
    assert (found.index_bytes, found.weights_bytes, found.missing, found.error) == (40, 42, [], "")
    assert len(found.config) == 64
    (tmp_path / "a.safetensors").unlink()
    assert files_of_model(str(tmp_path)).missing == ["a.safetensors"]
    (tmp_path / "model.safetensors.index.json").unlink()
    found = files_of_model(str(tmp_path))
    assert (found.index_bytes, found.weights_bytes, found.missing) == (None, 12, [])
    found = files_of_model(str(tmp_path / "b.safetensors"))
    assert (found.weights_bytes, found.missing, found.error) == (12, [], "")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """As in the folder of a snapshot that was copied without what its links mean."""
    model(tmp_path)
    for name in ("b.safetensors", "config.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "blobs" / name)
    found = files_of_model(str(tmp_path))
    assert (found.missing, found.weights_bytes, found.error) == (["b.safetensors", "config.json"], 30, "")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").symlink_to(tmp_path / "blobs" / "index")
    assert files_of_model(str(tmp_path)).missing == ["b.safetensors", "config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("names", "weights_bytes", "missing"),
    [
        ([], 0, ["config.json"]),
        (["config.json"], 0, []),
        (["params.json", "consolidated.safetensors"], 1, []),
        (["config.json", "a.safetensors", "a.bin", "a.pt"], 1, []),
        (["config.json", "a.bin", "b.bin", "training_args.bin", "optimizer.pt"], 2, []),
        (["config.json", "a.pt", "optimizer.pt", "scheduler.pt"], 1, []),
        (["config.json", "optimizer.pt"], 0, []),
        (["config.json", "a.safetensors", "pytorch_model.bin.index.json"], 1, []),
        (["config.json", "a.bin", "pytorch_model.bin.index.json"], 1, ["z.bin"]),
        (["config.json", "pytorch_model.bin.index.json"], 0, ["a.bin", "z.bin"]),
    ],
)
def test_files_that_vllm_loads(names: list[str], weights_bytes: int, missing: list[str], tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"x": "a.bin", "y": "z.bin"}})
    for name in names:
        (tmp_path / name).write_text(index if name.endswith("index.json") else "x")
    found = files_of_model(str(tmp_path))
    assert (found.weights_bytes, found.missing, found.error) == (weights_bytes, missing, "")


@pytest.mark.parametrize(
    "index", ["[1]", "{", '{"metadata": 7}', '{"weight_map": {"x": []}}', '{"metadata": {"total_size": Infinity}}']
)
def test_a_model_that_cannot_be_read(index: str, tmp_path: Path) -> None:
    assert files_of_model(str(tmp_path / "gone")).error == "No such file or directory"
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert files_of_model(str(tmp_path)).error


def test_a_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(collect, "model_files", lambda path: answered.wait() and None)
    try:
        found = collect_record("127.0.0.1", [model_command("/nfs/model")], limit_s=2)
    finally:
        answered.set()
    assert found.model is None and found.limits


def test_a_process_does_not_wait_at_its_end_for_what_is_stuck() -> None:
    code = "import time; from vllm_ray_ascend.doctor.collect import _start; _start(time.sleep, 600)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        collect._start(lambda: 1 // 0).result(timeout=60)


def test_packages_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch==2.10.0", "flashinfer-python==0.6", "nvidia-cutlass-dsl>=4", "xformers ; extra == 'x'"]
    monkeypatch.setattr(collect, "requires", lambda package: required)
    assert collect._cuda_requirements() == ["flashinfer-python==0.6", "nvidia-cutlass-dsl>=4"]
    monkeypatch.setattr(collect, "requires", lambda package: None)
    assert collect._cuda_requirements() == []


def test_versions_that_vllm_ascend_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch==2.10.0", "torch_npu (==2.10.0.post4)", "torchvision==0.25.0", "vllm>=1"]
    monkeypatch.setattr(collect, "requires", lambda package: required)
    assert collect._pins() == {"torch": "2.10.0", "torch-npu": "2.10.0.post4"}
    monkeypatch.setattr(collect, "requires", lambda package: None)
    assert collect._pins() == {}
