"""Every check on a machine that has the fault, and on one that has not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from tests.doctor.machine import MACHINES, MODEL_FILES, Machine
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.node_facts import STUCK
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.judge import choose_checks, find, status_of
from vllm_ray_ascend.doctor.queries import (
    ADDRESS,
    GATEWAY,
    HCCS,
    HEALTH,
    LINK,
    NEIGHBOUR,
    SUPER_POD,
    Query,
    device_addresses,
    ping_lines,
)
from vllm_ray_ascend.doctor.records import (
    DeviceFile,
    Failure,
    Holder,
    Limit,
    ModelFiles,
    NodeRecord,
    Output,
    RayNode,
    Route,
    SharedMemory,
    Snapshot,
    User,
)

pytestmark = pytest.mark.unit

Change = Callable[[NodeRecord], NodeRecord]
EVERY_CHECK = choose_checks("full", with_model=True)
HEAD = "10.0.0.1:6379"
SECOND = "10.0.0.2"
OURS: dict[str, str | None] = {"vllm-ray-ascend": "0.1.0", "vllm-ascend": "0.30.0rc2"}


def snapshot(*records: NodeRecord, failures: Iterable[Failure] = ()) -> Snapshot:
    return Snapshot(
        version="0.1.0",
        time=0.0,
        level="full",
        head_address=HEAD,
        versions=OURS,
        nodes=list(records),
        failures=list(failures),
    )


def pair(second: str = "a2", base: str = "a2") -> list[NodeRecord]:
    """Return the records of a healthy node, and of a second one."""
    return records_of(Machine(base, host=1), Machine(second, host=2))


def records_of(*machines: Machine) -> list[NodeRecord]:
    """Return what is collected on the nodes of a cluster: when addresses are known, NPUs ping each other."""
    records = [machine.record() for machine in machines]
    lines = ping_lines([device_addresses(record) for record in records])
    return [machine.ping(record, own) for machine, record, own in zip(machines, records, lines, strict=True)]


def findings(*records: NodeRecord, failures: Iterable[Failure] = ()) -> list[Finding]:
    return find(snapshot(*records, failures=failures), EVERY_CHECK)


def facts(**values: Any) -> Change:
    return lambda record: replace(record, facts=dataclasses.replace(record.facts, **values))


def record(**values: Any) -> Change:
    return lambda each: replace(each, **values)


def ray(**values: Any) -> Change:
    return lambda each: replace(
        each, ray=replace(each.ray or RayNode(npus=8, gpus=0, free_npus=8, sent=0, received=0), **values)
    )


def all_of(*changes: Change) -> Change:
    def change(each: NodeRecord) -> NodeRecord:
        for apply in changes:
            each = apply(each)
        return each

    return change


def environment(**values: str) -> Change:
    return lambda each: replace(each, environment={**each.environment, **values})


def versions(**values: str) -> Change:
    return lambda each: replace(each, versions={**each.versions, **values})


def files(**values: str) -> Change:
    return lambda each: replace(each, files={**each.files, **values})


def answering(query: Query, text: str) -> Change:
    """Every NPU answers a query with ``text``, in which {i} is its number."""

    def change(each: NodeRecord) -> NodeRecord:
        said = {query.line(die): Output(0, text.replace("{i}", str(die.physical_id))) for die in each.facts.dies}
        return replace(each, outputs={**each.outputs, **said})

    return change


def blind(text: str) -> Change:
    """No CANN, no device files: as in a container without the driver."""
    return all_of(
        facts(cann_devices=None, cann_error="OSError: libascendcl.so", device_files=()),
        record(files={}, cann_home=text),
    )


OUR_STRANGER = {207795: Holder(name="VLLM::EngineCor", command="python -m vllm", of_ray=True)}
THEIR_STRANGER = {207795: Holder(name="VLLM::EngineCor", command="python other.py", of_ray=False)}
LEFTOVER = {207795: Holder(name="VLLM::EngineCor", command="VLLM::EngineCore", of_ray=False, leftover=True)}
DRIVER = """Version=26.0.0
Innerversion=V100R001C29SPC001B217
compatible_version=[{}],[V100R001C29]
compatible_version_fw=[7.0.0,8.9.9]
"""
NO_ADDRESS = "Get ipconf failed, because no ip was preset there!\n"
CLOSED = {"davinci3": DeviceFile(mode=0o660, uid=1000, gid=1000, error="EPERM")}
OWNED = {"davinci3": DeviceFile(mode=0o660, uid=1000, gid=1001, error="EACCES")}


class Case(NamedTuple):
    """A fault of the second node: its machine, what else is changed there, and the finding that names it."""

    check: str
    code: str
    severity: str
    machine: str = "a2"
    change: Change = lambda each: each
    npus: tuple[int | None, ...] = (None,)
    says: str = ""
    remedy: str = ""


FAULTS = [
    Case(
        "worker-ports",
        "VRA-682",
        "warning",
        change=record(worker_ports=(20000, 62000)),
        remedy="--max-worker-port=60999.",
    ),
    Case(
        "roce-ping",
        "VRA-662",
        "error",
        "ping-loss",
        npus=(4,),
        says="66.67 % of the packets to NPU 4 of 10.0.0.1 (192.168.1.14) got lost",
    ),
    Case("npus-declared", "VRA-206", "error", change=ray(npus=16), says="it declares 16 NPUs to Ray, but 8 of 8"),
    Case(
        "plugin", "VRA-207", "error", change=facts(switches={"VLLM_RAY_ASCEND": "0"}), says="turns vllm-ray-ascend off"
    ),
    Case(
        "plugin", "VRA-214", "warning", change=facts(versions={**OURS, "vllm-ray-ascend": "0.0.9"}), says="0.0.9 there"
    ),
    Case("visible-devices", "VRA-212", "warning", change=facts(noset="0,1"), says="counts as false"),
    Case("npu-counts", "VRA-213", "warning", change=facts(device_files=(4, 5, 6, 7)), says="/dev/davinci* are 4"),
    Case("driver", "VRA-610", "error", change=blind(""), says="no driver is there"),
    Case("firmware", "VRA-611", "error", "old-firmware", says="firmware 6.4.12.1.241 does not fit driver 25.5.1"),
    Case("board", "VRA-612", "error", "board", npus=(2,), remedy="`npu-smi info -t board -i 2`"),
    Case("cann", "VRA-613", "error", change=blind(""), says="CANN is not found"),
    Case(
        "driver-cann",
        "VRA-614",
        "warning",
        "old-driver",
        says="driver 23.0.rc3 (V100R001C13) is older than",
        remedy="install the driver",
    ),
    Case(
        "driver-cann",
        "VRA-614",
        "info",
        change=files(driver=DRIVER.format("V100R001C27")),
        says="driver 26.0.0 (V100R001C29) is newer than the releases that CANN 8.5.1",
    ),
    Case("nnal", "VRA-615", "warning", change=record(nnal=[])),
    Case("same-driver", "VRA-616", "warning", "old-driver", says="driver 23.0.rc3 there, 25.5.1 on node 10.0.0.1"),
    Case("same-cann", "VRA-617", "error", "other-cann", says="CANN 8.3.RC2 there (/usr/local/Ascend/cann), 8.5.1 on"),
    Case("same-packages", "VRA-618", "error", change=versions(ray="2.55.0"), remedy="`pip install ray==2.60.0` there."),
    Case("same-packages", "VRA-618", "error", change=versions(Python="3.12.1"), says="Python 3.12 there, 3.11 on"),
    Case(
        "same-packages",
        "VRA-618",
        "error",
        change=versions(vllm="0.30.1+empty"),
        remedy="`VLLM_TARGET_DEVICE=empty pip install --no-deps --force-reinstall --no-binary vllm vllm==0.30.0` there",
    ),
    Case(
        "package-set",
        "VRA-619",
        "error",
        change=versions(**{"torch-npu": "2.9.0"}),
        says="torch-npu 2.9.0 is not made for",
    ),
    Case(
        "package-set",
        "VRA-619",
        "error",
        change=versions(**{"vllm-ascend": "0.29.0rc1"}),
        says="vllm-ascend 0.29.0rc1 is not made for vllm 0.30.0+empty",
        remedy="`pip install --pre 'vllm-ascend==0.30.*'`",
    ),
    Case(
        "package-set",
        "VRA-619",
        "error",
        change=record(pins={"torch": "2.9.1", "torch-npu": "2.10.0.post9"}),
        says="vllm-ascend 0.30.0rc2 is not made for torch 2.10.0",
        remedy="`pip install torch==2.9.1` there",
    ),
    Case(
        "cuda-packages", "VRA-620", "error", change=record(cuda_packages=["flashinfer-python"]), says="build for CUDA"
    ),
    Case("serve-llm", "VRA-621", "info", change=record(serve_llm_lacks=["vllm.a.b"]), says="which has no vllm.a.b"),
    Case("device-files", "VRA-630", "error", change=blind(""), npus=(None,) * 3, says="is not there, without which"),
    Case(
        "device-files",
        "VRA-629",
        "error",
        change=all_of(
            facts(device_files=()), record(devices={"davinci_manager": DeviceFile(mode=0o660, uid=0, gid=0)})
        ),
        says="CANN counts 8 NPUs, and none of their files",
    ),
    Case("device-access", "VRA-631", "error", change=record(devices=CLOSED), remedy="`--device /dev/davinci3`"),
    Case(
        "device-access",
        "VRA-632",
        "error",
        change=record(devices=OWNED),
        says="user 0 (groups 0) may not open /dev/davinci3, of user 1000, group 1001, mode 0660",
    ),
    Case("user", "VRA-633", "warning", change=record(user=User(uid=1234, groups=[5], name="")), remedy="npu:x:1234:5:"),
    Case("npu-smi", "VRA-634", "error", "dcmi", says="'dcmi module initialize failed. ret is -8005'"),
    Case(
        "health", "VRA-640", "error", "alarm", npus=(3,), says="its health is Alarm, with the codes 80E01801, 80E18402."
    ),
    Case("ecc", "VRA-641", "warning", "ecc", npus=(5,), says="2 double-bit errors, 1 pages are isolated"),
    Case("temperature", "VRA-642", "warning", "hot", npus=(0,), says="it has 97 C"),
    Case(
        "strangers",
        "VRA-643",
        "error",
        "stranger",
        npus=(1,),
        says="process 207795 (VLLMEngineCor, not in this node's /proc) has 55436 MB",
    ),
    Case(
        "strangers",
        "VRA-643",
        "error",
        "stranger",
        record(holders=THEIR_STRANGER),
        (1,),
        "(python other.py)",
        "`kill 207795`",
    ),
    Case(
        "strangers",
        "VRA-643",
        "error",
        "stranger",
        all_of(record(holders=LEFTOVER), ray(free_npus=4)),
        (1,),
        "(VLLM::EngineCore) has 55436 MB of its HBM and is left of an earlier Ray",
        "`kill 207795`",
    ),
    Case("hbm", "VRA-644", "warning", "hbm", npus=(6,), says="84 % of its HBM"),
    Case("roce-link", "VRA-650", "error", "link-down", npus=(3,), remedy="`sudo hccn_tool -i 3 -link -g` there"),
    Case("roce-address", "VRA-651", "error", "no-address", npus=(5,), remedy="`sudo hccn_tool -i 5 -ip -s address"),
    Case(
        "hccn-conf",
        "VRA-627",
        "warning",
        change=files(**{"hccn.conf": "address_0=192.168.2.10\naddress_4=192.168.9.14\n"}),
        npus=(4,),
        says="the address 192.168.2.14, and 192.168.9.14 in /etc/hccn.conf",
        remedy="`sudo hccn_tool -i 4 -ip -s address ADDRESS netmask 255.255.0.0`",
    ),
    Case(
        "unique-addresses", "VRA-652", "error", "twin-address", npus=(6,), says="192.168.1.10 of NPU 0 of node 10.0.0.1"
    ),
    Case(
        "gateway",
        "VRA-653",
        "warning",
        "no-gateway",
        npus=tuple(range(8)),
        says="in 172.16.2.0/24 without a gateway, that of NPU",
    ),
    Case("net-health", "VRA-654", "error", "net-health", npus=(2,), says="'Unreachable'"),
    Case("net-health", "VRA-654", "warning", "net-init", npus=(2,), says="'Init'"),
    Case("netdetect", "VRA-655", "warning", "no-netdetect", npus=tuple(range(8))),
    Case(
        "tls",
        "VRA-656",
        "error",
        "tls-on",
        npus=tuple(range(8)),
        says="TLS switched on; of the cluster's 16 ports 8 have it off",
        remedy="-tls -s enable 0`",
    ),
    Case("speed", "VRA-657", "warning", "slow-port", npus=(1,), says="100000 Mb/s, most of the cluster at 200000"),
    Case("roce-mtu", "VRA-658", "warning", "jumbo-port", npus=(1,), remedy="-mtu -s size 1500`"),
    Case(
        "switch-port",
        "VRA-663",
        "warning",
        "crossed-cables",
        npus=(2, 3),
        says="200GE1/0/9), where similar nodes have NPU ",
        remedy="-lldp -g`",
    ),
    Case("switch-port", "VRA-664", "info", "direct-fibre", npus=tuple(range(8)), says="another host without a switch"),
    Case("flapping", "VRA-659", "warning", "flapping", npus=(4,), says="went down 7 times"),
    Case("roce-errors", "VRA-660", "warning", "roce-errors", npus=(7,), says="roce_rx_err_pkt_num by 7."),
    Case(
        "limits",
        "VRA-670",
        "warning",
        change=record(limits={"Max open files": Limit(1024, 4096), "Max locked memory": Limit(None, None)}),
        says="may open 1024 files",
    ),
    Case(
        "limits",
        "VRA-671",
        "warning",
        change=record(limits={"Max open files": Limit(65536, None), "Max locked memory": Limit(65536, 65536)}),
        says="64 KiB",
    ),
    Case(
        "shared-memory",
        "VRA-672",
        "error",
        change=record(shared_memory=SharedMemory(64 << 20, 64 << 20)),
        says="64 MiB",
    ),
    Case(
        "shared-memory",
        "VRA-673",
        "warning",
        change=record(shared_memory=SharedMemory(8 << 30, 5 << 20)),
        says="5 of 8192 MiB",
    ),
    Case(
        "own-name",
        "VRA-674",
        "warning",
        change=all_of(record(own_addresses=["127.0.1.1"]), environment(VLLM_RAY_ASCEND_NODE_ENV="off")),
    ),
    Case("clock", "VRA-675", "warning", change=record(started=40.0, ended=42.0), says="at least 60.0 s behind that"),
    Case(
        "clock", "VRA-675", "warning", change=record(started=130.0, ended=133.1), says="at least 30.0 s ahead of that"
    ),
    Case(
        "reachable",
        "VRA-676",
        "error",
        change=record(unreachable={"10.0.0.1:4000": "No route to host"}),
        says="10.0.0.1:4000 (No route to host)",
    ),
    Case(
        "hccl-ports",
        "VRA-677",
        "warning",
        change=record(listening_ports=[22, 61130], port_holders={61130: "nginx (pid 7)"}),
        says="nginx (pid 7) listens on 61130, among HCCL's ports 61000 to 61511",
    ),
    Case(
        "same-variables",
        "VRA-678",
        "error",
        change=environment(HCCL_BUFFSIZE="400"),
        says="HCCL_BUFFSIZE is '400' where Ray was started there, not set on node 10.0.0.1",
    ),
    Case(
        "same-variables",
        "VRA-678",
        "warning",
        change=environment(HCCL_CONNECT_TIMEOUT="600"),
        says="not set on node 10.0.0.1: ranks behave differently.",
    ),
    Case("whitelist", "VRA-679", "warning", change=environment(HCCL_WHITELIST_DISABLE="0")),
    Case(
        "whitelist",
        "VRA-626",
        "warning",
        change=all_of(
            environment(HCCL_WHITELIST_DISABLE="0", HCCL_WHITELIST_FILE="/etc/list.json"),
            record(missing_files=["HCCL_WHITELIST_FILE"]),
        ),
        says="HCCL_WHITELIST_FILE=/etc/list.json is not there",
    ),
    Case(
        "huge-pages", "VRA-688", "info", change=files(transparent_hugepage="always madvise [never]\n"), says="(never)"
    ),
    Case(
        "npu-ports",
        "VRA-687",
        "warning",
        change=all_of(ray(shared_physical_ids=[2, 5]), environment(VLLM_RAY_ASCEND_NODE_ENV="off")),
        npus=(2, 5),
        says="VLLM_RAY_ASCEND_NODE_ENV=off is set where Ray was started there without HCCL_NPU_SOCKET_PORT_RANGE",
        remedy="`export HCCL_NPU_SOCKET_PORT_RANGE=auto`",
    ),
    Case(
        "host-interface",
        "VRA-683",
        "error",
        change=environment(GLOO_SOCKET_IFNAME="ens3"),
        says="GLOO_SOCKET_IFNAME=ens3, for gloo, selects none of its interfaces: lo 127.0.0.1, docker0 172.17.0.1,",
        remedy="`unset GLOO_SOCKET_IFNAME`",
    ),
    Case(
        "host-interface",
        "VRA-684",
        "error",
        change=record(routes={"10.0.0.1": Route("", "Network is unreachable")}),
        says="no route to 10.0.0.1, which node 10.0.0.1 uses for HCCL, gloo, vLLM (Network is unreachable)",
        remedy="`ip route get 10.0.0.1` there",
    ),
    Case(
        "host-interface",
        "VRA-686",
        "warning",
        change=record(routes={"10.0.0.1": Route("10.1.0.2")}),
        says="its address 10.0.0.2, for HCCL, gloo, vLLM, is on eth0, and the route to 10.0.0.1 leaves by eth1.",
    ),
    Case(
        "model",
        "VRA-693",
        "error",
        change=record(model=ModelFiles(path="/models/qwen", error="No such file or directory")),
        says="the model /models/qwen cannot be read there (No such file or directory).",
        remedy="`rsync -aL 10.0.0.1:/models/qwen /models/` there",
    ),
    Case(
        "model",
        "VRA-694",
        "error",
        change=record(model=replace(MODEL_FILES, missing=["a", "b", "c", "d"])),
        says="the model /models/qwen lacks a, b, c and 1 more.",
    ),
    Case(
        "model",
        "VRA-695",
        "error",
        change=record(model=replace(MODEL_FILES, weights_bytes=990)),
        says="have 990 bytes there (by its index 900), 1000 on node 10.0.0.1 (by its index 900).",
    ),
    Case(
        "model",
        "VRA-696",
        "warning",
        change=record(model=replace(MODEL_FILES, config="beef")),
        says="config.json of /models/qwen is not that of node 10.0.0.1",
    ),
    Case("overcommit", "VRA-628", "info", change=files(overcommit_memory="2\n"), remedy="`sudo sysctl "),
    Case(
        "same-auth",
        "VRA-680",
        "error",
        change=environment(RAY_AUTH_MODE="token"),
        says="RAY_AUTH_MODE is 'token' there, 'disabled' on node 10.0.0.1.",
        remedy="`export RAY_AUTH_MODE=disabled`",
    ),
    Case("same-mtu", "VRA-681", "warning", change=record(mtu=9000), says="an MTU of 9000, that of node 10.0.0.1 1500"),
]
A3_FAULTS = [
    Case(
        "split-cards",
        "VRA-635",
        "warning",
        "a3",
        facts(visible_devices="0,1,2"),
        says="NPU 2 of card 1, whose dies are NPU 2, 3",
    ),
    Case("hccs", "VRA-645", "error", "a3-hccs", npus=(5,), says="NOK"),
    Case(
        "super-pod",
        "VRA-646",
        "error",
        "a3-sdid",
        npus=(2,),
        says="its SDID 1000 is that of NPU 0 of node 10.0.0.1 too, in super pod 2.",
    ),
    Case("super-pod", "VRA-647", "error", "a3-sdid", says="different Server Indexes: 2, 7"),
    Case("roce-address", "VRA-651", "warning", "a3-no-address", npus=(5,)),
    Case("vnic", "VRA-661", "error", "a3-vnic", npus=(9,)),
]


def case_id(case: Case) -> str:
    return f"{case.check}-{case.code}-{case.severity}"


@pytest.mark.parametrize("base", ["a2", "a3", "a2-other-wording"])
def test_nothing_is_found_on_a_healthy_pair(base: str) -> None:
    for level in ("quick", "full"):
        records = pair(base, base)
        assert find(snapshot(*records), choose_checks(level)) == []
    assert status_of([]) == "ok"


@pytest.mark.parametrize("case", FAULTS + A3_FAULTS, ids=case_id)
def test_a_fault_is_found_where_it_is(case: Case) -> None:
    first, second = pair(case.machine, "a3" if case in A3_FAULTS else "a2")
    found = [
        each for each in findings(first, case.change(second)) if each.check == case.check and each.code == case.code
    ]
    assert [each.physical_id for each in found] == list(case.npus), found
    for each in found:
        assert (each.address, each.severity) == (SECOND, case.severity)
        assert case.says in each.text and case.remedy in each.remedy, each
        assert each.remedy, "every finding says what to do"


def test_every_check_has_a_fault() -> None:
    assert {case.check for case in FAULTS + A3_FAULTS} == set(CHECKS)


def test_every_machine_is_used() -> None:
    used = {case.machine for case in FAULTS + A3_FAULTS} | HEALTHY | UNKNOWN.keys()
    assert {folder.name for folder in MACHINES.iterdir()} == used


HEALTHY = {"a2", "a3", "a2-other-wording", "a3-unwired", "net-down"}
UNKNOWN = {
    "a2-container": ("hccn_tool is not there", {"roce-link", "roce-address", "unique-addresses", "net-health", "tls"}),
    "no-root": ("hccn_tool -link -g ended with code 1: 'Command execution failed, only root user", {"roce-link"}),
    "board-unknown": ("npu-smi info -t board says 'Unknown'", {"board"}),
    "ping-unknown": ("could not be checked on NPU 4: hccn_tool -ping says 'socket failed'", {"roce-ping"}),
    "no-lldp": ("could not be checked on NPU 4: no LLDP neighbour is heard by its port.", {"switch-port"}),
    "no-driver-file": ("the driver works, but its version.info is not there", {"driver"}),
    "no-cann-file": ("CANN works, but its install.info", {"cann"}),
}


@pytest.mark.parametrize("machine", UNKNOWN)
def test_what_cannot_be_read_is_unknown_and_never_ok(machine: str) -> None:
    reason, checks = UNKNOWN[machine]
    found = [each for each in findings(*pair(machine)) if each.severity == "unknown" and reason in each.text]
    assert checks <= {each.check for each in found}
    assert {each.address for each in found} == {SECOND} and {each.code for each in found} == {"VRA-601"}
    assert all(each.remedy for each in found)


def test_status_is_that_of_the_worst_finding() -> None:
    one = Finding(SECOND, "unknown", "VRA-601", "a")
    assert status_of([one]) == "unknown"
    assert status_of([one, replace(one, severity="info")]) == "unknown"
    assert status_of([one, replace(one, severity="warning")]) == "warning"
    assert status_of([one, replace(one, severity="warning"), replace(one, severity="error")]) == "critical"
    assert status_of([replace(one, severity="info")]) == "ok"


def _without_board(each: NodeRecord) -> dict[str, Output]:
    return {line: Output(1, "no\n") if "-t board" in line else output for line, output in each.outputs.items()}


DRIVER_WITHOUT_RANGES = "Version=25.5.1\nInnerversion=V100R001C25SPC001B217\n"
BUSY = {"davinci3": DeviceFile(mode=0o660, uid=1000, gid=1000, error="EBUSY")}
SOURCES: dict[str, Change] = {
    "limits": record(limits={}),
    "device-access": record(devices=BUSY),
    "shared-memory": record(shared_memory=None),
    "hccl-ports": record(listening_ports=None),
    "same-mtu": record(mtu=None),
    "model": record(model=None),
    "host-interface": record(routes={}),
    "host-interface ": record(interfaces=[]),
    "npu-ports": all_of(ray(shared_physical_ids=None), environment(VLLM_RAY_ASCEND_NODE_ENV="off")),
    "health": answering(HEALTH, "Health Status : NA\n"),
    "firmware": lambda each: replace(each, files={**each.files, "firmware": None}, outputs=_without_board(each)),
    "firmware ": lambda each: replace(each, files={**each.files, "driver": DRIVER_WITHOUT_RANGES}),
    "driver-cann": files(cann="version=8.5.1\n"),
    "driver-cann ": files(cann="runtime_running_version=[7.1.0.3.220:8.5.1]\n"),
}


@pytest.mark.parametrize("check", SOURCES)
def test_a_host_that_cannot_be_read_is_unknown(check: str) -> None:
    first, second = pair()
    found = findings(first, SOURCES[check](second))
    assert {(each.severity, each.address) for each in found} == {("unknown", SECOND)}
    assert {each.check for each in found} - {"board"} == {check.strip()}


def test_npu_smi_that_is_missing_makes_every_check_of_npus_unknown() -> None:
    first, second = pair()
    gone = {line: Output(None, "npu-smi is not there") for line in second.outputs}
    second = replace(facts(dies=(), npu_smi=None)(second), outputs=gone)
    found = findings(first, second)
    assert {each.severity for each in found} == {"unknown"} and {each.address for each in found} == {SECOND}
    on_a2 = {check.name for check in EVERY_CHECK if check.queries} - {"hccs", "super-pod", "vnic"}
    assert on_a2 | {"npu-smi"} == {each.check for each in found}


def test_roce_does_not_matter_on_a_single_node() -> None:
    assert findings(Machine("link-down").record()) == []
    assert find(snapshot(Machine("a2-container").record()), choose_checks("quick")) == []


def alone(*names: str, change: Change = lambda each: each) -> list[Finding]:
    """Return what `doctor --local` finds, without its note of what it does not judge."""
    made = replace(snapshot(change(replace(Machine(*names).record(), ray=None))), head_address="")
    note, *others = sorted(find(made, EVERY_CHECK), key=lambda each: each.code != "VRA-624")
    assert note.severity == "info" and {"tls", "npus-declared", "roce-ping"} <= set(words(note.text)), note
    return others


def words(text: str) -> list[str]:
    return text.replace(":", "").replace(",", "").split()


def test_a_node_that_is_looked_at_alone_may_be_one_of_several() -> None:
    """Which is when nobody else looks: the cluster does not start."""
    assert alone("a2") == [] == alone("a3")
    assert [each.code for each in alone("a2", change=environment(GLOO_SOCKET_IFNAME="ens3"))] == ["VRA-683"]
    found = alone("link-down", "net-health")
    assert [(each.code, each.severity, each.physical_id) for each in found] == [
        ("VRA-650", "error", 3),
        ("VRA-654", "error", 2),
    ]
    assert [(each.code, each.physical_id) for each in alone("slow-port", "no-address")] == [
        ("VRA-651", 5),
        ("VRA-657", 1),
    ]
    unread = alone("a2-container")
    assert {each.severity for each in unread} == {"unknown"} and "roce-link" in {each.check for each in unread}


def test_a_node_alone_whose_ports_have_no_addresses() -> None:
    without = answering(ADDRESS, NO_ADDRESS)
    (note,) = alone("link-down", change=without)
    assert (note.code, note.severity) == ("VRA-625", "info")
    assert {"roce-link", "net-health", "flapping"} <= set(words(note.text)) and "vnic" not in words(note.text)
    meant = all_of(without, files(**{"hccn.conf": "address_0=192.168.1.10\n"}))
    assert {each.code for each in alone("link-down", change=meant)} == {"VRA-650", "VRA-651"}


def test_nodes_that_were_left_out_count() -> None:
    made = replace(snapshot(Machine("link-down").record()), left_out=[SECOND])
    assert [each.code for each in find(replace(made, left_out_npus=8), EVERY_CHECK)] == ["VRA-650", "VRA-623"]
    assert [each.code for each in find(made, EVERY_CHECK)] == ["VRA-623"], "a head without NPUs"
    head = all_of(facts(cann_devices=None, device_files=(), dies=()), ray(npus=0, free_npus=0), record(started=40.0))
    late = replace(made, nodes=[head(Machine("a2").record())], left_out_npus=8)
    assert [each.check for each in find(late, choose_checks("quick", ["clock"]))] == ["clock"]


def test_without_ray_who_may_have_an_npu_is_not_known() -> None:
    for change in (record(holders={}), record(holders=THEIR_STRANGER)):
        (found,) = alone("stranger", change=change)
        assert (found.code, found.severity, found.physical_id) == ("VRA-643", "info", 1)
        assert found.text.endswith("has 55436 MB of its HBM; without Ray it is not known whose it is.")
    assert alone("stranger", change=record(holders=OUR_STRANGER)) == []
    assert [each.severity for each in alone("stranger", change=record(holders=LEFTOVER))] == ["error"]
    assert alone("hbm", change=record(listening_ports=[61000])) == []


def test_a_driver_that_names_cann_is_newer_and_fits() -> None:
    first, second = pair()
    newer = files(driver=DRIVER.format("V100R001C25"))
    assert {each.check for each in findings(first, newer(second))} == {"same-driver"}


def test_authentication_that_is_not_set_is_disabled() -> None:
    first, second = pair()
    for mode in ("disabled", "Disabled", ""):
        assert findings(first, environment(RAY_AUTH_MODE=mode)(second)) == []


def test_a_network_for_each_number_needs_no_gateway() -> None:
    no_gateway = answering(GATEWAY, "Get gateway failed, because no gateway was preset there!\n")
    nodes = [
        all_of(answering(ADDRESS, f"ipaddr:10.{{i}}.0.{host}\nnetmask:255.255.255.0\n"), no_gateway)(
            Machine("a2", host=host).record()
        )
        for host in (1, 2, 3)
    ]
    assert find(snapshot(*nodes), choose_checks("full", ["gateway"])) == []


def in_pod(pod: str, server: int) -> Change:
    return answering(SUPER_POD, f"SDID : 70{{i}}\nSuper Pod Size : 384\n{pod}Server Index : {server}\n")


def test_two_super_pods_may_have_the_same_numbers() -> None:
    def found(*pods: str) -> list[Finding]:
        nodes = [in_pod(pod, host)(Machine("a3", host=host).record()) for host, pod in enumerate(pods, 1)]
        return find(snapshot(*nodes), choose_checks("full", ["super-pod"]))

    assert found("Super Pod ID : 1\n", "Super Pod ID : 2\n") == []
    assert {each.severity for each in found("Super Pod ID : 1\n", "Super Pod ID : 1\n")} == {"error"}
    assert {each.severity for each in found("", "")} == {"warning"}, "which pods they are is not known"


def test_hccs_that_has_no_state_is_unknown() -> None:
    first, second = pair("a3", "a3")
    found = findings(first, answering(HCCS, "hccs health status             : NA\n")(second))
    assert {(each.check, each.severity, each.code) for each in found} == {("hccs", "unknown", "VRA-601")}


def test_a_link_of_two_ports_is_down_where_one_is() -> None:
    first, second = pair()
    found = findings(first, answering(LINK, "[port 0] link status : UP\n[port 1] link status : DOWN\n")(second))
    assert {each.code for each in found} == {"VRA-650"}


def test_the_release_of_cann_is_that_of_its_version_cfg_where_nothing_else_is() -> None:
    first, second = pair()
    found = findings(first, files(cann="toolkit_running_version=[7.1.0.3.220:8.0.RC1]\n")(second))
    assert [each.text for each in found if each.check == "same-cann"] == [
        "CANN 8.0.RC1 there (/usr/local/Ascend/cann), 8.5.1 on node 10.0.0.1."
    ]


def test_a_driver_that_hangs_is_said() -> None:
    first, second = pair()
    stuck = Output(None, f"npu-smi {STUCK}")
    hung = replace(facts(dies=(), npu_smi=None)(second), outputs=dict.fromkeys(second.outputs, stuck))
    found = [each for each in findings(first, hung) if each.check == "npu-smi"]
    assert [each.severity for each in found] == ["unknown"] and STUCK in found[0].text and "reboot" in found[0].remedy


def test_npu_smi_needs_its_library_in_a_container() -> None:
    first, second = pair()
    gone = {line: Output(None, "npu-smi is not there") for line in second.outputs}
    found = findings(first, replace(facts(dies=(), npu_smi=None)(second), outputs=gone))
    assert all("-v /usr/local/dcmi:/usr/local/dcmi" in each.remedy for each in found)


def test_commands_that_need_root_say_so() -> None:
    records = [pair(case.machine, "a3" if case in A3_FAULTS else "a2") for case in FAULTS + A3_FAULTS]
    remedies = [
        each.remedy
        for case, (first, second) in zip(FAULTS + A3_FAULTS, records, strict=True)
        for each in findings(first, case.change(second))
    ]
    needs_root = re.compile(r"`(hccn_tool|usermod|chronyc|timedatectl|ip link set|npu-smi set|dmesg|fuser)\b")
    assert [remedy for remedy in remedies if needs_root.search(remedy)] == []


def test_a_process_of_ray_is_no_stranger() -> None:
    first, second = pair("stranger")
    assert findings(first, replace(second, holders=OUR_STRANGER)) == []


def test_a_process_that_is_not_seen_is_no_stranger_while_ray_has_given_npus_away() -> None:
    """Also where another process of the container has the same id by chance."""
    first, second = pair("stranger")
    busy = ray(free_npus=4)(second)
    assert findings(first, busy) == []
    namesake = {207795: Holder(name="bash", command="bash", of_ray=False)}
    assert findings(first, replace(busy, holders=namesake)) == []
    assert [each.code for each in findings(first, replace(busy, holders=THEIR_STRANGER))] == ["VRA-643"]


def test_ports_and_memory_of_a_running_engine_are_no_fault() -> None:
    first, second = pair("hbm")
    assert findings(first, all_of(ray(free_npus=4), record(listening_ports=[61000]))(second)) == []


def test_ports_are_the_users_where_he_set_them() -> None:
    first, second = pair()
    taken = record(listening_ports=[61000], worker_ports=(61000, 62000))
    assert findings(first, all_of(taken, environment(HCCL_IF_BASE_PORT="50000"))(second)) == []
    assert findings(first, all_of(taken, record(first_port=62001))(second)) == [], "above those of outgoing connections"


def test_a_node_without_npus_is_checked_for_what_concerns_it() -> None:
    head = all_of(
        facts(cann_devices=None, cann_error="OSError", device_files=(), dies=(), npu_smi=None),
        ray(npus=0, free_npus=0),
        record(files={}, outputs={}, nnal=[], cann_home=""),
    )(Machine("a2", host=3).record())
    assert findings(*pair(), head) == []
    late = record(started=40.0, ended=42.0)(head)
    assert [(each.check, each.address) for each in findings(*pair(), late)] == [("clock", "10.0.0.3")]


def test_no_npu_at_all_is_unknown() -> None:
    empty = replace(facts(cann_devices=None, device_files=(), dies=())(Machine("a2").record()), ray=None)
    (found,) = findings(empty)
    assert (found.code, found.severity) == ("VRA-603", "unknown")


def test_without_ray_what_ray_declares_is_not_judged() -> None:
    assert findings(replace(Machine("a2").record(), ray=None)) == []
    assert [each.code for each in findings(replace(Machine("alarm").record(), ray=None))] == ["VRA-640"]


def test_nodes_that_do_not_answer_are_findings() -> None:
    failures = [
        Failure("10.0.0.3", 8, "no answer within 30 s"),
        Failure("10.0.0.4", 8, "ModuleNotFoundError: No module named 'vllm_ray_ascend.doctor'"),
    ]
    found = findings(Machine("a2").record(), failures=failures)
    assert [(each.address, each.code) for each in found] == [("10.0.0.3", "VRA-216"), ("10.0.0.4", "VRA-215")]


def test_the_most_frequent_value_is_the_right_one() -> None:
    odd = environment(HCCL_ALGO="level0:NA")(Machine("a2", host=1).record())
    others = [Machine("a2", host=host).record() for host in (2, 3)]
    (found,) = find(snapshot(odd, *others), choose_checks("quick"))
    assert (found.address, found.code) == ("10.0.0.1", "VRA-678")


def test_every_port_pings_and_is_pinged() -> None:
    nodes = [device_addresses(Machine("a2", host=host).record()) for host in (1, 2, 3)]
    lines = ping_lines(nodes)
    assert [len(each) for each in lines] == [8, 8, 8]
    assert lines[0][3] == "hccn_tool -i 3 -ping -g address 192.168.2.13"
    assert {line.split()[-1] for each in lines for line in each} == {a for node in nodes for a in node.values()}
    assert ping_lines(nodes[:1]) == [[]] and ping_lines([]) == []
    assert ping_lines([nodes[0], {}]) == [[], []], "without hccn_tool on the other node"


def test_firmware_is_judged_by_the_npus_where_its_file_is_missing() -> None:
    first, second = pair()
    assert findings(first, replace(second, files={**second.files, "firmware": None})) == []


def test_nodes_of_a3_that_are_connected_by_hccs_only() -> None:
    unwired = records_of(*[Machine("a3-unwired", host=host) for host in (1, 2)])
    found = findings(*unwired)
    assert {(each.code, each.severity) for each in found} == {("VRA-650", "info")} and status_of(found) == "ok"
    wired = findings(*records_of(Machine("a3", host=1), Machine("a3-unwired", host=2)))
    assert {(each.code, each.severity, each.address) for each in wired} == {("VRA-650", "error", SECOND)}


def test_a_port_without_link_is_one_finding() -> None:
    found = findings(*records_of(Machine("a2", host=1), Machine("link-down", "net-down", host=2)))
    assert [(each.check, each.physical_id) for each in found] == [("roce-link", 3)]


def on_switches(host: int, *chassis: str) -> NodeRecord:
    """Return a node whose NPUs are connected to these switches, in the order of their numbers."""
    made = Machine("a2", host=host).record()
    said = {
        NEIGHBOUR.line(die): Output(0, f"Chassis ID TLV\n\tMAC: {switch}\nPort ID TLV\n\tIfname: 1\n")
        for die, switch in zip(made.facts.dies, chassis, strict=True)
    }
    return replace(made, outputs={**made.outputs, **said})


@pytest.mark.parametrize(
    ("nodes", "crossed"),
    [
        (("aaaaaaaa", "bbbbbbbb", "bbbbbbbb"), []),  # a switch for each rack
        (("aaaabbbb", "ccccdddd"), []),  # two of them
        (("abcdefgh", "abcdefgh", "abcdefgh"), []),  # one for each number
        (("aaaaaaaa", "aaaaaaaa", "aaaaaabb"), []),  # its ports were used up
        (("abcdefgh", "abdcefgh", "abcdefgh"), [("10.0.0.2", 2), ("10.0.0.2", 3)]),
        (("abdcefgh", "abcdefgh", "abcdefgh"), [("10.0.0.1", 2), ("10.0.0.1", 3)]),
        (("aaaabbbb", "aaababbb", "ccccdddd", "ccccdddd"), [("10.0.0.2", 3), ("10.0.0.2", 4)]),
    ],
)
def test_switches_by_which_cables_are_crossed(nodes: tuple[str, ...], crossed: list[tuple[str, int]]) -> None:
    made = [on_switches(host, *switches) for host, switches in enumerate(nodes, 1)]
    found = find(snapshot(*made), choose_checks("full", ["switch-port"]))
    assert [(each.address, each.physical_id) for each in found] == crossed
    assert {each.code for each in found} <= {"VRA-663"}


def test_a_port_without_link_hears_nobody_for_that_reason() -> None:
    found = findings(*records_of(Machine("a2", host=1), Machine("no-lldp", "link-down", host=2)))
    assert [(each.check, each.physical_id) for each in found if each.severity == "error"] == [("roce-link", 3)]
    silent = answering(NEIGHBOUR, "")
    first, second = pair("link-down")
    unknown = [each for each in findings(first, silent(second)) if each.severity == "unknown"]
    assert [each.values["npus"] for each in unknown] == [[0, 1, 2, 4, 5, 6, 7]]


def test_a_network_of_its_own_for_hccl_and_gloo() -> None:
    """The route to Ray's address of a node says nothing of it."""
    own = environment(HCCL_SOCKET_IFNAME="=eth1", GLOO_SOCKET_IFNAME="eth1", VLLM_HOST_IP="")
    assert findings(*map(own, pair())) == []
    other_way = record(routes={"10.0.0.1": Route("10.0.0.2"), "10.1.0.1": Route("10.0.0.2")})
    first, second = map(own, pair())
    found = findings(first, other_way(second))
    assert {(each.code, each.address) for each in found} == {("VRA-686", SECOND)}
    assert [each.text.partition(", is on")[0] for each in found] == [
        "HCCL_SOCKET_IFNAME==eth1, for HCCL",
        "GLOO_SOCKET_IFNAME=eth1, for gloo",
    ]


def test_a_bridge_that_has_one_address_on_all_nodes() -> None:
    bridge = environment(GLOO_SOCKET_IFNAME="docker0")
    found = findings(*map(bridge, pair()))
    assert [(each.code, each.address) for each in found] == [("VRA-685", "10.0.0.1"), ("VRA-685", SECOND)]


def test_interfaces_are_judged_between_hosts_only() -> None:
    """Nodes without network namespaces of their own share a host; where nothing is derived each library chooses."""
    first, second = pair()
    shared = record(interfaces=[("eth0", "10.0.0.1"), ("eth0", "10.0.0.2")], routes={})
    assert findings(shared(first), shared(second)) == []
    off = all_of(environment(VLLM_RAY_ASCEND_NODE_ENV="off"), record(routes={}))
    assert findings(off(first), off(second)) == []


def test_a_node_behind_nat_is_unknown() -> None:
    first, second = pair()
    found = findings(first, record(interfaces=[("eth0", "172.16.0.9")], mtu=None)(second))
    assert {each.check for each in found} == {"same-mtu", "host-interface"}
    assert {each.text for each in found} == {"could not be checked: no interface has its address for Ray."}


def test_shared_npus_for_which_the_plugin_sets_a_range() -> None:
    first, second = pair()
    shared = ray(shared_physical_ids=[0])
    assert findings(first, shared(second)) == []
    given = environment(VLLM_RAY_ASCEND_NODE_ENV="off", HCCL_NPU_SOCKET_PORT_RANGE="16700-16800")
    assert findings(first, all_of(shared, given, record(routes={}))(second)) == []


def test_a_network_for_which_rules_choose_routes() -> None:
    """`ip rule from ADDRESS`: packets from the chosen address have a route of their own, or leave by another one."""
    own = environment(HCCL_SOCKET_IFNAME="eth1", GLOO_SOCKET_IFNAME="eth1", VLLM_HOST_IP="10.1.0.2")
    first, second = map(own, pair())
    first = environment(VLLM_HOST_IP="10.1.0.1")(first)
    for route in (Route("", "Network is unreachable"), Route("10.0.0.2")):
        ruled = replace(route, leaving={"10.1.0.2": "eth1"})
        assert findings(first, record(routes={"10.1.0.1": ruled})(second)) == []
        wrong = replace(route, leaving={"10.1.0.2": "eth0"})
        assert {each.code for each in findings(first, record(routes={"10.1.0.1": wrong})(second))} == {"VRA-686"}


def test_a_second_address_of_an_interface_has_a_label() -> None:
    first, second = pair()
    labelled = record(interfaces=[("eth0", "10.0.0.9"), ("eth0:1", "10.0.0.2")], routes={"10.0.0.1": Route("10.0.0.9")})
    assert findings(first, labelled(second)) == []


def test_link_local_addresses_are_no_targets() -> None:
    own = environment(VLLM_HOST_IP="fe80::1%eth0")
    first, second = (record(interfaces=[*each.interfaces, ("eth0", "fe80::1%eth0")])(each) for each in map(own, pair()))
    assert findings(first, second) == []


def test_routes_that_could_not_be_asked_for() -> None:
    first, second = pair()
    (found,) = findings(first, record(routes={}, routes_error="KeyError: 'x'")(second))
    assert found.text == "could not be checked: its routes to 10.0.0.1 are not known (KeyError: 'x')."


def test_an_empty_folder_is_no_model() -> None:
    first, second = pair()
    empty = record(model=ModelFiles(path="/models/qwen", missing=["config.json"]))
    (found,) = findings(empty(first), second)
    assert (found.address, found.code, found.severity) == ("10.0.0.1", "VRA-694", "error")
    assert found.text == "the model /models/qwen lacks config.json, all of its weights."
    assert found.remedy.startswith("`rsync -aL 10.0.0.2:/models/qwen /models/` there")
    (found,) = findings(first, record(model=replace(MODEL_FILES, weights_bytes=0))(second))
    assert found.text == "the model /models/qwen lacks all of its weights."
    without = all_of(facts(cann_devices=None, device_files=(), dies=()), ray(npus=0, free_npus=0))
    other = record(model=replace(MODEL_FILES, weights_bytes=7))
    heads = [all_of(without, change)(Machine("a2", host=host).record()) for host, change in ((3, empty), (4, other))]
    found_there = find(snapshot(*heads, first, second), choose_checks("quick", ["model"], with_model=True))
    assert [(each.address, each.severity) for each in found_there] == [("10.0.0.3", "info")]


def test_a_model_is_copied_from_a_host_of_ipv6() -> None:
    first, second = pair()
    gone = record(model=ModelFiles(path="/qwen", error="No such file or directory"))(second)
    found = find(snapshot(replace(first, address="fd00::1"), gone), choose_checks("quick", ["model"], with_model=True))
    assert [each.remedy.partition(" there")[0] for each in found] == ["`rsync -aL [fd00::1]:/qwen /`"]


def test_a_model_that_no_node_has_and_one_that_a_head_lacks() -> None:
    gone = record(model=ModelFiles(path="/m", error="No such file or directory"))
    found = findings(*map(gone, pair()))
    assert [(each.code, each.address) for each in found] == [("VRA-693", "10.0.0.1"), ("VRA-693", SECOND)]
    assert all("Give --model the path that all nodes have" in each.remedy for each in found)
    head = all_of(facts(cann_devices=None, device_files=(), dies=()), ray(npus=0, free_npus=0), gone)
    found = find(
        snapshot(*pair(), head(Machine("a2", host=3).record())), choose_checks("quick", ["model"], with_model=True)
    )
    assert [(each.code, each.severity, each.address) for each in found] == [("VRA-693", "info", "10.0.0.3")]
