"""Bring a cluster up, down, say how it is, and run commands on its nodes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.visible import VARIABLE, entries
from vllm_ray_ascend.softnpu.activate import environment
from vllm_ray_ascend.softnpu.cluster import namespaces, plain, processes, state
from vllm_ray_ascend.softnpu.cluster.plan import (
    MARKER,
    Cluster,
    ClusterError,
    Kind,
    Node,
    Shape,
    check_name,
    check_visible,
    choose_subnet,
    describe_difference,
    make_cluster,
    node_environment,
    ray_start_command,
    with_ray_defaults,
)

Report = Callable[[str], None]
NodeSettings = Mapping[int, Mapping[str, str]]

_START_LIMIT_S = 120.0


class RayStartTimeoutError(ClusterError):
    """`ray start` waited for its own raylet longer than Ray allows."""


@dataclasses.dataclass(frozen=True)
class NodeStatus:
    """How a node is. ``resources`` are Ray's totals; ``reason`` says why the node is dead, and is empty otherwise."""

    index: int
    hostname: str
    address: str
    alive: bool
    npus: int
    resources: dict[str, float]
    reason: str


def best_kind() -> tuple[Kind, str]:
    """The kind of nodes that this machine can make, and why not the better one (empty when it is that)."""
    reason = namespaces.missing()
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

    ``settings`` are further environment variables of the Ray processes of single nodes, by node index.  Whatever
    goes wrong on the way, nothing of the cluster is left behind.

    Raises:
        ClusterError: the cluster is up in another shape, or could not be brought up.
        VllmRayAscendError: the software NPU cannot be used here (no compiler, a real driver); Ray missing or too old.
    """
    check_name(name)
    _check_outside()
    with state.locked():
        existing = state.load(name)
        if existing is not None:
            if all(node.alive for node in _status_of(existing)):
                _check_same(existing, shape, subnet)
                return existing, False
            report(f"cluster {name!r} is there but not healthy: making it anew")
            _remove(existing)
        require_ray(installed("ray"))
        base = environment(os.environ)
        cluster = _plan(name, shape, subnet)
        for node in cluster.nodes:
            check_visible(_visible_on(node, settings or {}), shape.npus_per_node, node.hostname)
        try:
            _create_or_remove(cluster, base, settings or {}, report)
        except RayStartTimeoutError:
            report("this machine is busy: Ray's own limit for a start, 30 s, was not enough; trying once more")
            _create_or_remove(cluster, base, settings or {}, report)
        return cluster, True


def down(name: str) -> bool:
    """Remove the cluster with all its processes and traces; False when there was none."""
    check_name(name)
    _check_outside()
    with state.locked():
        cluster = state.load(name)
        if cluster is None:
            return False
        _remove(cluster)
        return True


def find(name: str) -> Cluster:
    """The cluster ``name``, which must have been brought up."""
    cluster = state.load(check_name(name))
    if cluster is None:
        raise ClusterError(f"there is no cluster {name!r}: vllm-ray-ascend softnpu cluster up --name {name}")
    return cluster


def status(name: str) -> tuple[Cluster, list[NodeStatus]]:
    """The cluster ``name`` and how its nodes are."""
    cluster = find(name)
    return cluster, _status_of(cluster)


def node_command(cluster: Cluster, index: int, command: list[str]) -> list[str]:
    """The command line that, run on the host, runs ``command`` on node ``index`` (the head is 1).

    The process it starts hands signals on to the command and ends with its exit status (128 + N for signal N).
    """
    node = cluster.node(index)
    if cluster.shape.kind == "plain":
        return command
    pid = namespaces.init_pid(cluster, node)
    if pid is None:
        raise ClusterError(
            f"node {node.hostname} is dead: vllm-ray-ascend softnpu cluster down --name {cluster.name}, then up again."
        )
    enter = Path(__file__).with_name("enter.py")
    return [sys.executable, "-I", "-S", str(enter), str(pid), *command]


def command_environment(cluster: Cluster, index: int, base: Mapping[str, str]) -> dict[str, str]:
    """Environment for a command on node ``index``: software NPUs, RAY_ADDRESS, and this Python's programs in PATH."""
    result = node_environment(cluster, cluster.node(index), environment(base))
    programs = str(Path(sys.executable).parent)
    if programs not in result.get("PATH", "").split(os.pathsep):
        result["PATH"] = os.pathsep.join(filter(None, [programs, result.get("PATH", "")]))
    return result


def _plan(name: str, shape: Shape, subnet: str | None) -> Cluster:
    directory = state.directory_of(name)
    if shape.kind == "namespaces":
        network = choose_subnet(name, namespaces.taken_networks(), subnet)
        return make_cluster(name, os.getuid(), shape, directory, network, gcs_port=6379)
    if subnet is not None:
        raise ClusterError("--subnet needs nodes with addresses of their own, which only root can make.")
    return make_cluster(name, os.getuid(), shape, directory, None, gcs_port=_free_port())


def _create_or_remove(cluster: Cluster, base: Mapping[str, str], settings: NodeSettings, report: Report) -> None:
    try:
        _create(cluster, base, settings, report)
    except BaseException:
        _remove(cluster)
        raise


def _create(cluster: Cluster, base: Mapping[str, str], settings: NodeSettings, report: Report) -> None:
    state.save(cluster)
    if cluster.shape.kind == "namespaces":
        report(f"making {len(cluster.nodes)} nodes with addresses in {cluster.subnet}")
        namespaces.create(cluster, base)
    else:
        plain.create(cluster)
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
        variables = {**node_environment(cluster, node, base), **settings.get(node.index, {})}
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
                f"`ray start` on {node.hostname} was not done after {_START_LIMIT_S:g} s:\n{_tail(path)}"
            ) from None
        if code != 0:
            output = _tail(path)
            kind = RayStartTimeoutError if "timed out during startup" in output else ClusterError
            raise kind(f"`ray start` on {node.hostname} failed with exit code {code}:\n{output}")


def _wait_until_alive(cluster: Cluster, settings: NodeSettings) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while True:
        dead = [node for node in _status_of(cluster) if not node.alive]
        if not dead:
            break
        if time.monotonic() > deadline:
            reasons = "; ".join(f"{node.hostname}: {node.reason}" for node in dead)
            raise ClusterError(f"nodes did not become alive within {_START_LIMIT_S:g} s: {reasons}")
        time.sleep(0.2)
    for node, found in zip(cluster.nodes, _status_of(cluster), strict=True):
        visible = _visible_on(node, settings)
        expected = len(entries(visible) or range(cluster.shape.npus_per_node))
        if found.npus != expected:
            raise ClusterError(
                f"Ray counts {found.npus} NPUs on {node.hostname}, not {expected} ({VARIABLE}="
                f"{visible or ''}): see what pyACL finds there: vllm-ray-ascend softnpu exec -- "
                "python -c 'import acl; print(acl.rt.get_device_count())'"
            )


def _visible_on(node: Node, settings: NodeSettings) -> str | None:
    return {**os.environ, **settings.get(node.index, {})}.get(VARIABLE)


def _status_of(cluster: Cluster) -> list[NodeStatus]:
    raylets = {
        processes.variable_of(pid, "SOFTNPU_NODE")
        for pid in processes.of_cluster(cluster)
        if processes.name_of(pid) == "raylet"
    }
    known = _ask_ray(cluster)
    result = []
    for node in cluster.nodes:
        entry = known.get(node.hostname)
        if node.hostname not in raylets:
            reason = "its raylet is not running"
        elif entry is None:
            reason = f"Ray at {cluster.ray_address} does not answer for it"
        else:
            reason = "" if entry["alive"] else "Ray has given it up"
        resources = dict(entry["resources"]) if entry else {}
        npus = int(resources.get("NPU", 0))
        result.append(NodeStatus(node.index, node.hostname, node.address, not reason, npus, resources, reason))
    return result


def _ask_ray(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """What the control store says, by node name; empty when it does not answer."""
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
        return {node["name"]: node for node in json.loads(result.stdout)}
    except (subprocess.TimeoutExpired, ValueError):
        return {}


def _remove(cluster: Cluster) -> None:
    processes.kill_cluster(cluster)
    if cluster.shape.kind == "namespaces":
        namespaces.destroy(cluster)
    else:
        plain.destroy(cluster, state.created(cluster))
    state.forget(cluster)


def _check_same(existing: Cluster, shape: Shape, subnet: str | None) -> None:
    difference = describe_difference(existing.shape, shape)
    if subnet is not None and subnet != existing.subnet:
        difference = "; ".join(filter(None, [difference, f"subnet {existing.subnet}, not {subnet}"]))
    if difference:
        raise ClusterError(
            f"cluster {existing.name!r} is up with {difference}: take it down first "
            f"(vllm-ray-ascend softnpu cluster down --name {existing.name}) or give this one another --name."
        )


def _check_outside() -> None:
    if MARKER in os.environ:
        raise ClusterError(f"this runs inside cluster {os.environ[MARKER]!r}: run it on the host instead.")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
