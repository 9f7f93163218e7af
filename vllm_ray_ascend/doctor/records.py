"""What was collected on a node: plain data that travels, is saved, and is judged anywhere."""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.node_facts import NodeFacts
from vllm_ray_ascend.environment.ports import FIRST_PORT

Level = Literal["quick", "full"]


class Output(msgspec.Struct, frozen=True):
    """What a command wrote, and its exit code: None where it did not run or did not end, and ``text`` says why."""

    code: int | None
    text: str


class DeviceFile(msgspec.Struct, frozen=True, kw_only=True):
    """A device file, and what opening it for reading and writing says: the name of an error, such as EACCES, or "".

    "no answer in time" where that did not end.
    """

    mode: int
    uid: int
    gid: int
    error: str = ""


class Limit(msgspec.Struct, frozen=True):
    """A limit of the raylet's resources; None: unlimited."""

    soft: int | None
    hard: int | None


class User(msgspec.Struct, frozen=True, kw_only=True):
    """The user who runs Ray, as whom every engine runs; ``name`` is empty where /etc/passwd has no entry."""

    uid: int
    groups: list[int]
    name: str


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process of this node that npu-smi names. ``of_ray``: it descends from this node's raylet, or one that lives."""

    name: str
    """The kernel's short name."""
    command: str
    of_ray: bool
    leftover: bool = False
    """A raylet started it that has ended."""


class SharedMemory(msgspec.Struct, frozen=True):
    """Size of /dev/shm in bytes, and what is free of it."""

    total: int
    free: int


class Route(msgspec.Struct, frozen=True):
    """The own address with which packets to another one leave; empty where there is no route: ``error`` says why."""

    source: str
    error: str = ""
    leaving: dict[str, str] = {}
    """By own addresses, the interface by which packets from them leave, which rules for senders may choose."""


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files on a node. ``error``: why its path cannot be read, such as "No such file or directory"."""

    path: str
    error: str = ""
    config: str = ""
    """SHA-256 of config.json; empty where there is none, as for a single file."""
    index_bytes: int | None = None
    """Size of all weights by the index of the files; None where there is no index."""
    weights_bytes: int = 0
    """Size of the files with weights that are there."""
    missing: list[str] = []
    """Files that the index names, or without which no model is loaded, and that are not there."""


class RayNode(msgspec.Struct, frozen=True, kw_only=True):
    """What Ray has of the node. ``sent`` and ``received`` are times of the driver's clock around the collection."""

    node_id: str = ""
    raylet: str = ""
    """HOST:PORT of its raylet."""
    npus: float
    gpus: float
    free_npus: float
    sent: float
    received: float
    shared_physical_ids: list[int] | None = None
    """NPUs of which several ranks of engines have parts; collected on demand, None where that is not known."""


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was collected on one node. What could not be read is None or missing."""

    address: str
    facts: NodeFacts
    root: bool = True
    """Whether it was collected as root, without which hccn_tool answers little."""
    outputs: dict[str, Output] = {}
    """By command line, with the tool's name alone in front."""
    files: dict[str, str | None] = {}
    """Text by path. None: it is not there, or may not be read."""
    devices: dict[str, DeviceFile] = {}
    """Device files by path."""
    environment: dict[str, str] = {}
    """Known variables with which Ray was started there, secrets hidden."""
    versions: dict[str, str | None] = {}
    """Versions of packages, and of Python; None where not installed."""
    cuda_packages: list[str] = []
    """Packages that only vLLM's build for CUDA requires, as its metadata lists them."""
    pins: dict[str, str] = {}
    """Versions of torch and torch-npu that vllm-ascend requires, as its metadata names them."""
    missing_files: list[str] = []
    """Variables that name a file that is not there."""
    serve_llm_lacks: list[str] = []
    """MODULE.NAME of what Ray Serve LLM imports of vLLM and vLLM does not have; collected on demand."""
    cann_home: str = ""
    """Where CANN was found; empty where it was not."""
    nnal: list[str] = []
    """Paths of ATB's version.info."""
    limits: dict[str, Limit] = {}
    user: User | None = None
    shared_memory: SharedMemory | None = None
    holders: dict[int, Holder] = {}
    """Processes that npu-smi names and this node's /proc has, by pid."""
    listening_ports: list[int] | None = None
    port_holders: dict[int, str] = {}
    """"NAME (pid N)" of who listens on a port that HCCL may get, where the user of this process may see it."""
    first_port: int = FIRST_PORT
    """The first one that HCCL is given on this node."""
    worker_ports: tuple[int, int] | None = None
    """Range of ports of Ray's workers; None where the system chooses, or without Ray."""
    own_addresses: list[str] = []
    """To what the node's own name resolves, where VLLM_RAY_ASCEND_NODE_ENV is off."""
    mtu: int | None = None
    """That of the interface with Ray's address."""
    unreachable: dict[str, str] = {}
    """Peers that could not be connected to, HOST:PORT, with the reason."""
    interfaces: list[tuple[str, str]] = []
    """Name and address of each network interface; collected on demand."""
    routes: dict[str, Route] = {}
    """By the address to which they lead; collected on demand."""
    routes_error: str = ""
    """Why there are no routes; empty where they were collected, or not asked for."""
    model: ModelFiles | None = None
    """Of the path given with `--model`; None without that, or where the file system did not answer in time."""
    started: float = 0.0
    ended: float = 0.0
    ray: RayNode | None = None
    """None where Ray was not looked at."""


class Failure(msgspec.Struct, frozen=True):
    """A node that returned no record."""

    address: str
    npus: float
    reason: str


class Link(msgspec.Struct, frozen=True):
    """HCCL between one NPU of each of two nodes, by Ray's addresses: seconds of the shortest transfers of 16 MiB.

    ``error`` is why it failed; then there are no times. ``memory_bytes`` is what the communicator takes of the first.
    """

    first: str
    first_physical_id: int
    second: str
    second_physical_id: int
    error: str = ""
    connect_s: float = 0.0
    all_reduce_s: float = 0.0
    send_s: float = 0.0
    receive_s: float = 0.0
    memory_bytes: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that was collected, as `--save` writes it: findings are made of nothing else."""

    version: str
    """Of vllm-ray-ascend."""
    time: float
    level: Level
    head_address: str = ""
    """HOST:PORT of the Ray cluster; empty with `--local`."""
    versions: dict[str, str | None] = {}
    """Of the packages of which all nodes are to have the driver's."""
    switches: list[str] = []
    """Variables that the driver passes to its workers, whatever is set on their nodes."""
    nodes: list[NodeRecord]
    failures: list[Failure] = []
    left_out: list[str] = []
    """Addresses of live nodes that `--nodes` does not name."""
    left_out_npus: float = 0
    """NPUs that these declare to Ray."""
    links: list[Link] = []
    """Of `--deep`."""
    busy: list[str] = []
    """Nodes whose NPUs were in use, so that `--deep` did not test them."""


Status = Literal["ok", "warning", "critical", "unknown"]
ExitCode = Literal[0, 1, 2, 3]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes."""

    version: str
    time: float
    level: Level
    status: Status
    exit_code: ExitCode
    nodes: list[NodeSummary]
    unanswered: list[str] = []
    """Addresses of nodes that did not answer."""
    checks: list[str]
    """Names of the checks that were made."""
    findings: list[Finding]
    links: list[Link] = []
    """What `--deep` measured."""
    changes: list[Change] = []
    """Against the file of `--compare`."""


class NodeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One node in a report. ``npus`` are those that CANN counts, None where it cannot."""

    address: str
    hostname: str
    npus: int | None
    chip: str
    driver: str
    cann: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One value that differs between two snapshots; None: it is not in that one."""

    address: str
    what: str
    before: str | None
    now: str | None
