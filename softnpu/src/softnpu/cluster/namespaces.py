"""Nodes as Linux namespaces: own address, host name, process table and /dev/shm; needs root and iproute2.

A node lives as long as its process 1, which only sleeps.  Nothing is registered anywhere: when that process is killed,
the kernel kills all others of the node and removes its mounts and its end of the veth pair.
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

from softnpu.cluster import processes
from softnpu.cluster.plan import Cluster, Node, hosts_file, node_environment
from softnpu.errors import ClusterError

_UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]

_EXEC_LIMIT_S = 10.0

# Process 1 of a node does nothing. Ignoring SIGCHLD makes the kernel reap the orphans that it adopts; without a handler
# for SIGINT, which Python sets, no signal from inside the node ends it.
_SLEEP = "import signal as s; s.signal(s.SIGCHLD, s.SIG_IGN); s.signal(s.SIGINT, s.SIG_DFL)\nwhile True: s.pause()"

# Its start. /sys is mounted again because it shows the network interfaces of the namespace in which it was mounted.
# Each node mounts its own folder at the path of the head's session: old versions of Ray (2.48) use the head's path on
# every node, and would share the file that holds a node's own address.
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


def missing_requirement() -> str | None:
    """Return why this machine cannot make such nodes; None when it can."""
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


def list_taken_networks() -> list[str]:
    """Return the IPv4 networks that this machine routes, without the default route."""
    routes = json.loads(_run_ip("-json", "-4", "route", "show", "table", "all"))
    networks = [str(route["dst"]) for route in routes]
    return [network for network in networks if _is_network(network)]


def create_nodes(cluster: Cluster, base: Mapping[str, str]) -> None:
    """Make the bridge, the namespaces and the veth pairs of all nodes."""
    directory = Path(cluster.directory)
    (directory / "hosts").write_text(hosts_file(cluster))
    # No node reaches a name server; this file makes look-ups fail at once instead of after a time-out.
    (directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    prefix = cluster.subnet.partition("/")[2]
    _run_ip("link", "add", cluster.bridge, "type", "bridge")
    _run_ip("address", "add", f"{cluster.gateway}/{prefix}", "dev", cluster.bridge)
    _run_ip("link", "set", cluster.bridge, "up")
    for node in cluster.nodes:
        _start_node(cluster, node, base)
        pid = _wait_for_init_pid(cluster, node)
        if pid is None:
            raise ClusterError(f"process 1 of node {node.hostname} ended at once: see {directory}/{node.hostname}.log.")
        _connect_node(cluster, node, pid, prefix)


def _start_node(cluster: Cluster, node: Node, base: Mapping[str, str]) -> None:
    # setsid --fork: process 1 must not be our child, or we would have to wait for it.
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


def _connect_node(cluster: Cluster, node: Node, pid: int, prefix: str) -> None:
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
    _run_ip("link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    _run_ip("link", "set", node.link, "master", cluster.bridge, "up")
    _run_command([*inside, "link", "set", "lo", "up"])
    _run_command([*inside, "address", "add", f"{node.address}/{prefix}", "dev", "eth0"])
    _run_command([*inside, "link", "set", "eth0", "up"])
    # Ray, vLLM and others read their own address from the default route, although nothing is reached through it.
    _run_command([*inside, "route", "add", "default", "via", cluster.gateway])


def remove_nodes(cluster: Cluster) -> None:
    """Remove what outlives the nodes' processes: the bridge, and veth pairs whose namespace is still being removed."""
    links = {link["ifname"] for link in json.loads(_run_ip("-json", "link", "show"))}
    for link in [*(node.link for node in cluster.nodes), cluster.bridge]:
        if link in links:
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
    left = {link["ifname"] for link in json.loads(_run_ip("-json", "link", "show"))} & {cluster.bridge}
    if left:
        raise ClusterError(f"network bridge {cluster.bridge} could not be removed: ip link delete {cluster.bridge}")


def find_init_pid(cluster: Cluster, node: Node) -> int | None:
    """Return the host's id of the node's process 1; None when the node is gone."""
    for pid in processes.find_cluster_processes(cluster):
        if processes.get_variable(pid, "SOFTNPU_NODE") == node.hostname and _pid_in_namespace(pid) == 1:
            return pid
    return None


def _wait_for_init_pid(cluster: Cluster, node: Node) -> int | None:
    """Wait for process 1 of a node that has just reported ready: during its exec, /proc shows no variables of it."""
    end = time.monotonic() + _EXEC_LIMIT_S
    while (pid := find_init_pid(cluster, node)) is None and time.monotonic() < end:
        time.sleep(0.01)
    return pid


def _pid_in_namespace(pid: int) -> int:
    """Return the process's id in its own namespace (the last of NSpid in /proc/PID/status); 0 when it is gone."""
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


def _run_ip(*arguments: str) -> str:
    return _run_command(["ip", *arguments])


def _run_command(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout
