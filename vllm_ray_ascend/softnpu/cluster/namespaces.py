"""Nodes as Linux namespaces: own address, host name, process table and /dev/shm; needs root and iproute2.

A node lives as long as its process 1, which only sleeps.  Nothing is registered anywhere: when that process is killed
the kernel ends all others of the node and removes its mounts and its end of the network cable.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from vllm_ray_ascend.softnpu.cluster import processes
from vllm_ray_ascend.softnpu.cluster.plan import Cluster, ClusterError, Node, hosts_file, node_environment

_UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]

_EXEC_LIMIT_S = 10.0

# What process 1 of a node does: nothing. Ignoring SIGCHLD makes the kernel reap the orphans that fall to it; without
# a handler for SIGINT, which Python sets, the kernel lets no signal from inside the node end it.
_SLEEP = "import signal as s; s.signal(s.SIGCHLD, s.SIG_IGN); s.signal(s.SIGINT, s.SIG_DFL)\nwhile True: s.pause()"

# What it does before that. /sys is mounted anew because it shows the network interfaces of the namespace in which it
# was mounted. Where the head has its session each node has its own: old versions of Ray (2.48) keep to the head's path
# on every node, and would share the file in which a node's own address is.
_INIT = """
set -e
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t sysfs sysfs /sys
mount --bind "$1/hosts" /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind "$1/resolv.conf" /etc/resolv.conf
mkdir -p "$3" "$4"
mount --bind "$3" "$4"
hostname "$2"
echo ready
exec "$5" -I -S -c "$6" >/dev/null 2>&1
"""


def missing() -> str | None:
    """Why this machine cannot make such nodes; None when it can."""
    if os.geteuid() != 0:
        return "not running as root"
    absent = [
        tool for tool in ("ip", "unshare", "nsenter", "setsid", "mount", "hostname") if shutil.which(tool) is None
    ]
    if absent:
        return f"commands not found: {', '.join(absent)}"
    trial = subprocess.run(
        [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, text=True, check=False
    )
    if trial.returncode != 0:
        return f"this machine forbids namespaces: {trial.stderr.strip()}"
    return None


def taken_networks() -> list[str]:
    """IPv4 networks that this machine routes; the default route is not one of them."""
    routes = json.loads(_ip("-json", "-4", "route", "show", "table", "all"))
    networks = [str(route["dst"]) for route in routes]
    return [network for network in networks if _is_network(network)]


def create(cluster: Cluster, base: Mapping[str, str]) -> None:
    """Bridge, namespaces and cables of all nodes."""
    directory = Path(cluster.directory)
    (directory / "hosts").write_text(hosts_file(cluster))
    # No node reaches a name server; saying so makes look-ups fail at once instead of after a time-out.
    (directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    prefix = cluster.subnet.partition("/")[2]
    _ip("link", "add", cluster.bridge, "type", "bridge")
    _ip("address", "add", f"{cluster.gateway}/{prefix}", "dev", cluster.bridge)
    _ip("link", "set", cluster.bridge, "up")
    for node in cluster.nodes:
        _start_node(cluster, node, base)
        pid = _started_pid(cluster, node)
        if pid is None:
            raise ClusterError(f"process 1 of node {node.hostname} ended at once: see {directory}/{node.hostname}.log.")
        _plug(cluster, node, pid, prefix)


def _start_node(cluster: Cluster, node: Node, base: Mapping[str, str]) -> None:
    # setsid --fork: process 1 shall not be a child of ours, which would have to wait for it.
    command = ["setsid", "--fork", *_UNSHARE, "sh", "-c", _INIT, "softnpu-node", cluster.directory, node.hostname]
    command += [str(cluster.temp_dir(each)) for each in (node, cluster.nodes[0])]
    command += [sys.executable, _SLEEP]
    log_path = Path(cluster.directory) / f"{node.hostname}.log"
    environment = node_environment(cluster, node, base)
    with log_path.open("wb") as log:
        starter = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
    assert starter.stdout is not None
    with starter.stdout as ready:
        line = ready.readline()
    starter.wait()
    if line != b"ready\n":
        raise ClusterError(f"cannot make node {node.hostname}: {log_path.read_text().strip()}")


def _plug(cluster: Cluster, node: Node, pid: int, prefix: str) -> None:
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
    _ip("link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    _ip("link", "set", node.link, "master", cluster.bridge, "up")
    _run([*inside, "link", "set", "lo", "up"])
    _run([*inside, "address", "add", f"{node.address}/{prefix}", "dev", "eth0"])
    _run([*inside, "link", "set", "eth0", "up"])
    # Ray, vLLM and others learn their own address from the default route, though nothing is reached through it.
    _run([*inside, "route", "add", "default", "via", cluster.gateway])


def destroy(cluster: Cluster) -> None:
    """Remove what outlives the nodes' processes: the bridge, and cables whose namespace is still being torn down."""
    links = {link["ifname"] for link in json.loads(_ip("-json", "link", "show"))}
    for link in [*(node.link for node in cluster.nodes), cluster.bridge]:
        if link in links:
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
    left = {link["ifname"] for link in json.loads(_ip("-json", "link", "show"))} & {cluster.bridge}
    if left:
        raise ClusterError(f"network bridge {cluster.bridge} could not be removed: ip link delete {cluster.bridge}")


def init_pid(cluster: Cluster, node: Node) -> int | None:
    """Process 1 of the node as the host counts it; None when the node is gone."""
    for pid in processes.of_cluster(cluster):
        if processes.variable_of(pid, "SOFTNPU_NODE") == node.hostname and _pid_inside(pid) == 1:
            return pid
    return None


def _started_pid(cluster: Cluster, node: Node) -> int | None:
    """The same of a node that has just said that it is ready: its process 1 is nobody for as long as its exec takes."""
    end = time.monotonic() + _EXEC_LIMIT_S
    while (pid := init_pid(cluster, node)) is None and time.monotonic() < end:
        time.sleep(0.01)
    return pid


def _pid_inside(pid: int) -> int:
    """The process's id in its own namespace (the last of NSpid in /proc/PID/status)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:")), 0)


def _is_network(text: str) -> bool:
    try:
        ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return False
    return True


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout
