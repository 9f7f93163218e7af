"""Bring a cluster up and down, report its state, and run commands on its nodes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from softnpu.activate import make_environment
from softnpu.cluster import namespaces, plain, processes, state
from softnpu.cluster.plan import (
    MARKER,
    VISIBLE_DEVICES,
    Cluster,
    Kind,
    Node,
    Shape,
    check_name,
    check_ray_version,
    check_visible,
    choose_subnet,
    describe_difference,
    make_cluster,
    node_environment,
    parse_visible,
    ray_start_command,
    with_ray_defaults,
)
from softnpu.errors import ClusterError

Report = Callable[[str], None]
NodeSettings = Mapping[int, Mapping[str, str]]

_START_LIMIT_S = 120.0
_COUNT_LIMIT_S = 20.0
"""In which Ray learns what a node that is alive has."""


class RayStartTimeoutError(ClusterError):
    """`ray start` waited for its own raylet longer than Ray allows."""


@dataclasses.dataclass(frozen=True)
class NodeStatus:
    """The state of a node. ``resources`` are Ray's totals; ``reason`` says why the node is dead, else it is empty."""

    index: int
    hostname: str
    address: str
    alive: bool
    npus: int
    resources: dict[str, float]
    reason: str


def require_ray() -> None:
    """Raise ClusterError, with the pip command, where Ray is missing or too old."""
    try:
        installed = version("ray")
    except PackageNotFoundError:
        installed = None
    check_ray_version(installed)


def choose_node_kind() -> tuple[Kind, str]:
    """Return the best kind of nodes that this machine can make, and why not namespaces (empty if it is those)."""
    reason = namespaces.missing_requirement()
    return ("plain", reason) if reason else ("namespaces", "")


def up(
    name: str,
    shape: Shape,
    *,
    subnet: str | None = None,
    settings: NodeSettings | None = None,
    report: Report = print,
) -> tuple[Cluster, bool]:
    """Make the cluster, or find it already up in this shape; the flag says whether it was made now.

    ``settings`` are further environment variables of the Ray processes of single nodes, by node index.  When a step
    fails, everything made so far is removed.

    Raises:
        ClusterError: Ray is missing or too old, the cluster is up in another shape, or it could not be brought up.
        SoftNpuError: the software NPU cannot be used here (no compiler, a real driver).
    """
    check_name(name)
    require_ray()
    _reject_nested_use()
    with state.lock_clusters():
        existing = state.load_cluster(name)
        if existing is not None:
            if all(node.alive for node in _read_status(existing)):
                _reject_other_shape(existing, shape, subnet)
                return existing, False
            report(f"cluster {name!r} exists but is not healthy: making it again")
            _remove_cluster(existing)
        base = make_environment(os.environ)
        cluster = _plan_cluster(name, shape, subnet)
        for node in cluster.nodes:
            check_visible(_visible_devices(node, settings or {}), shape.npus(node.index), node.hostname)
        try:
            _create_or_remove(cluster, base, settings or {}, report)
        except RayStartTimeoutError:
            report("this machine is busy: Ray's own limit for a start, 30 s, was not enough; trying again")
            _create_or_remove(cluster, base, settings or {}, report)
        return cluster, True


def down(name: str) -> bool:
    """Remove the cluster with all its processes and files; False when there was none."""
    check_name(name)
    _reject_nested_use()
    with state.lock_clusters():
        cluster = state.load_cluster(name)
        if cluster is None:
            return False
        _remove_cluster(cluster)
        return True


def restart_ray(cluster: Cluster, index: int) -> None:
    """Start Ray again on node ``index``, whose raylet has ended. Raises ClusterError if the node does not come back."""
    _start_ray(cluster, [cluster.node(index)], make_environment(os.environ), {})
    _wait_until_alive(cluster, {})


def find_cluster(name: str) -> Cluster:
    """Return the cluster ``name``. Raises ClusterError if it has not been brought up."""
    cluster = state.load_cluster(check_name(name))
    if cluster is None:
        raise ClusterError(f"there is no cluster {name!r}: softnpu cluster up --name {name}")
    return cluster


def status(name: str) -> tuple[Cluster, list[NodeStatus]]:
    """Return the cluster ``name`` and the state of its nodes."""
    cluster = find_cluster(name)
    return cluster, _read_status(cluster)


def node_command(cluster: Cluster, index: int, command: list[str]) -> list[str]:
    """Return the command line that, run on the host, runs ``command`` on node ``index`` (the head is 1).

    Its process forwards signals to the command and exits with its exit status (128 + N for signal N).
    """
    node = cluster.node(index)
    if cluster.shape.kind == "plain":
        return command
    pid = namespaces.find_init_pid(cluster, node)
    if pid is None:
        raise ClusterError(f"node {node.hostname} is dead: softnpu cluster down --name {cluster.name}, then up again.")
    enter = Path(__file__).with_name("enter.py")
    return [sys.executable, "-I", "-S", str(enter), str(pid), *command]


def command_environment(cluster: Cluster, index: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a command on node ``index``: software NPUs, RAY_ADDRESS, this Python in PATH."""
    return _with_programs(node_environment(cluster, cluster.node(index), make_environment(base)))


def _with_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in whose PATH the programs beside this Python are: `ray`, `vllm`."""
    programs, path = str(Path(sys.executable).parent), environment.get("PATH", "")
    if programs in path.split(os.pathsep):
        return dict(environment)
    return {**environment, "PATH": os.pathsep.join(filter(None, [programs, path]))}


def _plan_cluster(name: str, shape: Shape, subnet: str | None) -> Cluster:
    directory = state.cluster_directory(name)
    if shape.kind == "namespaces":
        network = choose_subnet(name, namespaces.list_taken_networks(), subnet)
        return make_cluster(name, os.getuid(), shape, directory, network, gcs_port=6379)
    if subnet is not None:
        raise ClusterError("--subnet needs nodes with addresses of their own, which only root can make.")
    return make_cluster(name, os.getuid(), shape, directory, None, gcs_port=_find_free_port())


def _create_or_remove(cluster: Cluster, base: Mapping[str, str], settings: NodeSettings, report: Report) -> None:
    try:
        _create_cluster(cluster, base, settings, report)
    except BaseException:  # Ctrl-C too: half a cluster is of no use
        _remove_cluster(cluster)
        raise


def _create_cluster(cluster: Cluster, base: Mapping[str, str], settings: NodeSettings, report: Report) -> None:
    state.save_cluster(cluster)
    if cluster.shape.kind == "namespaces":
        report(f"making {len(cluster.nodes)} nodes with addresses in {cluster.subnet}")
        namespaces.create_nodes(cluster, base)
    else:
        plain.create_nodes(cluster)
    started = time.monotonic()
    head, *others = cluster.nodes
    for group in ([head], others):
        for node in group:
            report(f"starting Ray on {node.hostname} ({node.address})")
        _start_ray(cluster, group, base, settings)
    _wait_until_alive(cluster, settings)
    report(f"all nodes are alive after {time.monotonic() - started:.0f} s")


def _start_ray(cluster: Cluster, group: list[Node], base: Mapping[str, str], settings: NodeSettings) -> None:
    starting = []
    for node in group:
        command = ray_start_command([sys.executable, "-m", "ray.scripts.scripts"], cluster, node)
        variables = {**_with_programs(node_environment(cluster, node, base)), **settings.get(node.index, {})}
        del variables["RAY_ADDRESS"]  # `ray start` takes it for the cluster to join
        path = Path(cluster.directory) / f"{node.hostname}.ray.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                node_command(cluster, node.index, command),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cluster.directory,
            )
        starting.append((node, process, path))
    for node, process, path in starting:
        try:
            code = process.wait(_START_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ClusterError(
                f"`ray start` on {node.hostname} was not done after {_START_LIMIT_S:g} s:\n{_last_lines(path)}"
            ) from None
        if code != 0:
            output = _last_lines(path)
            if "Cannot include dashboard with missing packages" in output:
                raise ClusterError(_missing_packages(path.read_text(errors="replace")))
            kind = RayStartTimeoutError if "timed out during startup" in output else ClusterError
            raise kind(f"`ray start` on {node.hostname} failed with exit code {code}:\n{output}")


def _missing_packages(output: str) -> str:
    """Return the message for a Ray that has no dashboard to start; ``output`` is what it has printed."""
    found = re.search(r"No module named '([^']+)'", output)
    lack = f"it has no module {found[1]!r}" if found else "parts of it are missing"
    return (
        f"Ray cannot start its dashboard, as --dashboard asks: {lack} in {sys.executable}. Install 'ray[default]' of "
        "the same version there; in a clone of vllm-ray-ascend `python3.11 demo/install.py ray`, and "
        "PYTHONPATH=$PWD/.ray for this command. Or leave --dashboard out."
    )


def _wait_until_alive(cluster: Cluster, settings: NodeSettings) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while True:
        dead = [node for node in _read_status(cluster) if not node.alive]
        if not dead:
            break
        if time.monotonic() > deadline:
            reasons = "; ".join(f"{node.hostname}: {node.reason}" for node in dead)
            raise ClusterError(f"nodes did not become alive within {_START_LIMIT_S:g} s: {reasons}")
        time.sleep(0.2)
    deadline = min(deadline, time.monotonic() + _COUNT_LIMIT_S)
    while problem := _wrong_count(cluster, settings):
        if time.monotonic() > deadline:
            raise ClusterError(problem)
        time.sleep(0.2)


def _wrong_count(cluster: Cluster, settings: NodeSettings) -> str:
    """Return on which node Ray counts other NPUs than there are; empty where on none. Ray knows a node before these."""
    for node, found in zip(cluster.nodes, _read_status(cluster), strict=True):
        visible = _visible_devices(node, settings)
        expected = len(parse_visible(visible) or range(cluster.shape.npus(node.index)))
        if found.npus != expected:
            return (
                f"Ray counts {found.npus} NPUs on {node.hostname}, not {expected} ({VISIBLE_DEVICES}="
                f"{visible or ''}): check what pyACL finds there: softnpu exec -- "
                "python -c 'import acl; print(acl.rt.get_device_count())'"
            )
    return ""


def _visible_devices(node: Node, settings: NodeSettings) -> str | None:
    return {**os.environ, **settings.get(node.index, {})}.get(VISIBLE_DEVICES)


def _read_status(cluster: Cluster) -> list[NodeStatus]:
    nodes_with_raylet = {
        processes.get_variable(pid, "SOFTNPU_NODE")
        for pid in processes.find_cluster_processes(cluster)
        if processes.get_process_name(pid) == "raylet"
    }
    reported = _query_ray(cluster)
    result = []
    for node in cluster.nodes:
        entry = reported.get(node.hostname)
        if node.hostname not in nodes_with_raylet:
            reason = "its raylet is not running"
        elif entry is None:
            reason = f"Ray at {cluster.ray_address} does not answer for it"
        else:
            reason = "" if entry["alive"] else "Ray reports it dead"
        resources = dict(entry["resources"]) if entry else {}
        npus = int(resources.get("NPU", 0))
        result.append(NodeStatus(node.index, node.hostname, node.address, not reason, npus, resources, reason))
    return result


def _query_ray(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Return the nodes that Ray's control store reports, by name; empty when it does not answer."""
    try:
        socket.create_connection((cluster.nodes[0].address, cluster.gcs_port), timeout=1).close()
    except OSError:
        return {}
    probe = Path(__file__).with_name("probe.py")
    command = [sys.executable, "-I", str(probe), cluster.ray_address]
    try:
        result = subprocess.run(
            command, env=with_ray_defaults(os.environ), capture_output=True, text=True, timeout=20, check=False
        )
        nodes = sorted(json.loads(result.stdout), key=lambda node: bool(node["alive"]))
        return {node["name"]: node for node in nodes}  # a node that was dead and is alive again is there twice
    except (subprocess.TimeoutExpired, ValueError):
        return {}


def _remove_cluster(cluster: Cluster) -> None:
    processes.kill_cluster_processes(cluster)
    if cluster.shape.kind == "namespaces":
        namespaces.remove_nodes(cluster)
    else:
        plain.remove_nodes(cluster, state.creation_time(cluster))
    state.remove_cluster(cluster)


def _reject_other_shape(existing: Cluster, shape: Shape, subnet: str | None) -> None:
    difference = describe_difference(existing.shape, shape)
    if subnet is not None and subnet != existing.subnet:
        difference = "; ".join(filter(None, [difference, f"subnet {existing.subnet}, not {subnet}"]))
    if difference:
        raise ClusterError(
            f"cluster {existing.name!r} is up with {difference}: take it down first "
            f"(softnpu cluster down --name {existing.name}) or give this one another --name."
        )


def _reject_nested_use() -> None:
    if MARKER in os.environ:
        raise ClusterError(f"this command runs inside cluster {os.environ[MARKER]!r}: run it on the host instead.")


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _last_lines(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
