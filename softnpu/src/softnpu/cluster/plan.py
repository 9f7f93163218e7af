"""What a cluster is made of, decided without touching the system: names, addresses, commands."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from softnpu.errors import ClusterError

Kind = Literal["namespaces", "plain"]

MARKER = "SOFTNPU_CLUSTER"
"""Environment variable that every process of a cluster carries; its value is the cluster's token."""

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
"""CANN's variable with the list of devices that a process sees."""

DASHBOARD_PORT = 8265
"""Ray's default."""

RAY_MINIMUM = "2.48"
"""The oldest Ray that works: older ones lack accelerator ids of NPU actors."""

_SUPERNET = ipaddress.IPv4Network("10.77.0.0/16")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")
# A Unix socket path holds 107 bytes; Ray appends "/session_<date>_<pid>/sockets/plasma_store.<n>", up to 68 of them.
_LONGEST_TEMP_DIR = 107 - 68


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a user requests. ``memory`` is that of one software NPU, in bytes with an optional suffix K, M or G.

    ``npus_of_nodes`` are the numbers of NPUs where nodes differ, 0 for a node without; ``npus_per_node`` is the most.
    With ``dashboard`` the head has Ray's dashboard, which `ray job` needs, and which needs packages of ray[default].
    """

    nodes: int = 2
    npus_per_node: int = 8
    cpus_per_node: int = 2
    memory: str = "1G"
    kind: Kind = "namespaces"
    npus_of_nodes: tuple[int, ...] = ()
    dashboard: bool = False

    def npus(self, index: int) -> int:
        """Return the number of NPUs of node ``index``, counted from 1."""
        return self.npus_of_nodes[index - 1] if self.npus_of_nodes else self.npus_per_node

    def __post_init__(self) -> None:
        if self.npus_of_nodes and (len(self.npus_of_nodes) != self.nodes or min(self.npus_of_nodes) < 0):
            listed = ",".join(map(str, self.npus_of_nodes))
            raise ClusterError(f"--npus-per-node {listed} does not fit --nodes {self.nodes}: give a number per node.")
        for option, value, most in (
            ("--nodes", self.nodes, 200),
            ("--npus-per-node", self.npus_per_node, 64),
            ("--cpus-per-node", self.cpus_per_node, 1024),
        ):
            if not 1 <= value <= most:
                raise ClusterError(f"{option} {value} is out of range: give a number from 1 to {most}.")
        if not re.fullmatch(r"[1-9][0-9]*[KMG]?", self.memory):
            raise ClusterError(f"--memory {self.memory!r} is not a size: write bytes, or a number with K, M or G (1G).")


@dataclasses.dataclass(frozen=True)
class Node:
    """One node. ``index`` counts from 1 (the head); ``link`` is the host's end of its veth pair."""

    index: int
    hostname: str
    address: str
    link: str


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster as planned. Everything else about it is read from the processes that carry its marker."""

    name: str
    token: str
    shape: Shape
    subnet: str
    gateway: str
    bridge: str
    gcs_port: int
    directory: str
    nodes: tuple[Node, ...]

    @property
    def ray_address(self) -> str:
        """HOST:PORT of the cluster's control store, as RAY_ADDRESS wants it."""
        return f"{self.nodes[0].address}:{self.gcs_port}"

    def temp_dir(self, node: Node) -> Path:
        """Folder of Ray's session files, logs and sockets on ``node``."""
        return Path(self.directory) / f"n{node.index}"

    def node(self, index: int) -> Node:
        """Return the node with number ``index``, counted from 1."""
        if not 1 <= index <= len(self.nodes):
            raise ClusterError(f"cluster {self.name!r} has no node {index}: give --node 1 to {len(self.nodes)}.")
        return self.nodes[index - 1]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the state file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cluster:
        """Return the cluster that ``to_json`` described. Raises KeyError or TypeError for other data."""
        rest = {key: value for key, value in data.items() if key not in ("shape", "nodes")}
        nodes = tuple(Node(**node) for node in data["nodes"])
        shape = Shape(**{**data["shape"], "npus_of_nodes": tuple(data["shape"].get("npus_of_nodes", ()))})
        return cls(shape=shape, nodes=nodes, **rest)


def parse_npus(text: str) -> int | tuple[int, ...]:
    """Return the numbers of --npus-per-node: one for all nodes, or a list with one of each. Raises ValueError."""
    numbers = tuple(int(number) for number in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def make_shape(
    nodes: int, npus: int | tuple[int, ...], cpus_per_node: int, memory: str, kind: Kind, dashboard: bool = False
) -> Shape:
    """Return the shape for the numbers of `parse_npus`."""
    most, of_nodes = (npus, ()) if isinstance(npus, int) else (max(npus), npus)
    return Shape(nodes, most, cpus_per_node, memory, kind, of_nodes, dashboard)


def check_name(name: str) -> str:
    """Return ``name`` if it can name a cluster, its hosts and its files; else raise ClusterError."""
    if not _NAME.fullmatch(name):
        raise ClusterError(
            f"--name {name!r} cannot name a cluster: use 1 to 20 lower-case letters, digits and hyphens, as in test-1."
        )
    return name


def make_token(name: str, uid: int) -> str:
    """Return the value of MARKER for user ``uid``'s cluster ``name``. It differs between users."""
    return f"{uid}-{name}"


def choose_subnet(name: str, taken: Iterable[str], wanted: str | None = None) -> ipaddress.IPv4Network:
    """Return a /24 network for the cluster that overlaps none of ``taken`` (networks that this machine routes already).

    The search starts at a place derived from the name, so that a cluster gets the same addresses each time.
    """
    used = [ipaddress.IPv4Network(network, strict=False) for network in taken]
    if wanted is not None:
        return _wanted_subnet(wanted, used)
    candidates = list(_SUPERNET.subnets(new_prefix=24))
    start = 0 if name == "default" else _hash_text(name)[0]
    for candidate in candidates[start:] + candidates[:start]:
        if not any(candidate.overlaps(network) for network in used):
            return candidate
    raise ClusterError(f"no free /24 network in {_SUPERNET}: this machine routes all of it; choose one with --subnet.")


def _wanted_subnet(wanted: str, used: list[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.IPv4Network(wanted)
    except ValueError as error:
        raise ClusterError(f"--subnet {wanted!r} is not an IPv4 network ({error}): write it as 10.77.5.0/24.") from None
    if network.prefixlen > 24:
        raise ClusterError(f"--subnet {wanted} is too small: give a /24 network or larger, such as 10.77.5.0/24.")
    for other in used:
        if network.overlaps(other):
            raise ClusterError(f"--subnet {wanted} overlaps {other}, which this machine already uses: choose another.")
    return network


def make_cluster(
    name: str, uid: int, shape: Shape, directory: Path, subnet: ipaddress.IPv4Network | None, gcs_port: int
) -> Cluster:
    """Plan the cluster. ``subnet`` is None for nodes without namespaces, which all have the address 127.0.0.1."""
    check_name(name)
    token = make_token(name, uid)
    short = "snpu" + _hash_text(token).hex()[:6]  # interface names hold at most 15 characters
    nodes = tuple(
        Node(i, f"{name}-{i}", str(subnet[i]) if subnet else "127.0.0.1", f"{short}-{i}" if subnet else "")
        for i in range(1, shape.nodes + 1)
    )
    cluster = Cluster(
        name=name,
        token=token,
        shape=shape,
        subnet=str(subnet) if subnet else "",
        gateway=str(subnet[-2]) if subnet else "",
        bridge=short if subnet else "",
        gcs_port=gcs_port,
        directory=str(directory),
        nodes=nodes,
    )
    if (length := len(str(cluster.temp_dir(nodes[-1])))) > _LONGEST_TEMP_DIR:
        longest = _LONGEST_TEMP_DIR - length + len(name)
        raise ClusterError(f"--name {name} makes Ray's socket paths too long: use at most {longest} characters.")
    return cluster


def ray_start_command(ray: list[str], cluster: Cluster, node: Node) -> list[str]:
    """Return the ``ray start`` command line of ``node``; ``ray`` is the command that runs Ray's command line."""
    shape = cluster.shape
    command = [
        *ray,
        "start",
        "--disable-usage-stats",
        f"--node-ip-address={node.address}",
        f"--node-name={node.hostname}",
        f"--num-cpus={shape.cpus_per_node}",
        "--object-store-memory=134217728",  # tensors do not go through it; Ray's least is 75 MiB
        f"--temp-dir={cluster.temp_dir(node)}",
    ]
    if node.index == 1:
        command += ["--head", f"--port={cluster.gcs_port}", f"--include-dashboard={str(shape.dashboard).lower()}"]
        command += [f"--dashboard-host={node.address}"] if shape.dashboard else []
    else:
        command += [f"--address={cluster.ray_address}"]
    if shape.kind == "plain":  # raylets that share an address must not compete for Ray's default ports
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    return command


def hosts_file(cluster: Cluster) -> str:
    """Return /etc/hosts of every node: without it nodes cannot resolve their own host names, as gloo does."""
    lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{node.address} {node.hostname}" for node in cluster.nodes)]
    return "\n".join(lines) + "\n"


def node_environment(cluster: Cluster, node: Node, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process on ``node``: ``base`` with the node's identity and the cluster's address."""
    environment = with_ray_defaults(base)
    environment.update(
        {
            MARKER: cluster.token,
            "RAY_ADDRESS": cluster.ray_address,
            "SOFTNPU_DEVICES": str(cluster.shape.npus(node.index)),
            "SOFTNPU_MEMORY": cluster.shape.memory,
            "SOFTNPU_NODE": node.hostname,
            "SOFTNPU_STATE_DIR": str(plain_state_dir(cluster)) if cluster.shape.kind == "plain" else "/dev/shm",
        }
    )
    if cluster.shape.dashboard:
        environment["RAY_DASHBOARD_ADDRESS"] = f"http://{cluster.nodes[0].address}:{DASHBOARD_PORT}"
    return environment


def with_ray_defaults(base: Mapping[str, str]) -> dict[str, str]:
    """Return ``base`` with settings of Ray on which all processes of a cluster, and its clients, must agree.

    Without RAY_AUTH_MODE Ray (from 2.59) chooses by whether some other program left a token in the home directory.
    """
    return {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **base}


def plain_state_dir(cluster: Cluster) -> Path:
    """Return the folder for the tables of a cluster without namespaces; it is removed with the cluster."""
    return Path("/dev/shm") / f"softnpu-{cluster.token}"


def check_ray_version(installed: str | None) -> None:
    """Raise ClusterError where Ray is missing (None) or older than RAY_MINIMUM. Unreadable versions pass."""
    remedy = "python -m pip install 'ascend-softnpu[cluster]'"
    if installed is None:
        raise ClusterError(f"`softnpu cluster` needs Ray, which is not installed: {remedy}")
    try:
        too_old = Version(installed).release < Version(RAY_MINIMUM).release
    except InvalidVersion:  # a custom build
        return
    if too_old:
        raise ClusterError(f"Ray {installed} is too old for `softnpu cluster`, it needs {RAY_MINIMUM}: {remedy}")


def parse_visible(visible: str | None) -> list[str] | None:
    """Return the entries of a visible list; None where it is unset or blank, which makes all devices visible."""
    if not visible or not visible.strip():
        return None
    return [entry.strip() for entry in visible.split(",")]


def check_visible(visible: str | None, npus: int, hostname: str) -> None:
    """Raise ClusterError if ``visible``, a node's ASCEND_RT_VISIBLE_DEVICES, names a device that the node lacks."""
    listed = parse_visible(visible) or []
    for position, entry in enumerate(listed):
        if not entry.isdecimal() or int(entry) >= npus or entry in listed[:position]:
            raise ClusterError(
                f"{VISIBLE_DEVICES}={visible} names {entry!r}, but node {hostname} has devices 0 to {npus - 1}, "
                "each of which can be named once: correct or unset that variable, or give more --npus-per-node."
            )


def describe_difference(existing: Shape, wanted: Shape) -> str:
    """Return the options in which two shapes differ, for a message; empty when they are equal."""
    differing = []
    for field in dataclasses.fields(Shape):
        have, want = getattr(existing, field.name), getattr(wanted, field.name)
        if have != want:
            differing.append(f"{field.name.replace('_', ' ')} {have}, not {want}")
    return "; ".join(differing)


def _hash_text(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
