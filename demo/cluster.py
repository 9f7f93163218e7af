"""Where the server runs: on this machine's NPUs, or on a local cluster of software NPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape
from softnpu.errors import ClusterError

from demo.options import DemoError

CLUSTER = "serve"
_NODES = 2
_MOST_NPUS_PER_NODE = 8
_RAY_START_LIMIT_S = 120


@dataclasses.dataclass(frozen=True)
class NpuCluster:
    """A Ray cluster with NPUs.

    ``address`` is the server's as seen from here, ``bind`` the one it listens on; ``command`` turns a command line into
    one that runs there, with the variables of ``environment``.
    """

    description: str
    address: str
    bind: str
    command: Callable[[list[str]], list[str]]
    environment: Mapping[str, str]


def has_real_npus() -> bool:
    """Return whether this machine has Ascend NPUs: device files, or the driver's own tool."""
    return any(Path("/dev").glob("davinci[0-9]*")) or shutil.which("npu-smi") is not None


@contextlib.contextmanager
def software_npus(needed: int, environ: Mapping[str, str]) -> Iterator[NpuCluster]:
    """Yield the cluster ``CLUSTER``; it is removed afterwards if it was made here."""
    cluster = _healthy_cluster()
    created = cluster is None
    if cluster is not None:
        _check_enough(needed, cluster.shape.nodes, cluster.shape.npus_per_node)
    else:
        _check_enough(needed, _NODES, _MOST_NPUS_PER_NODE)
        shape = _shape(needed, environ)
        cluster, _ = manager.up(CLUSTER, shape, report=lambda line: print(f"  {line}", flush=True))
    try:
        yield to_npu_cluster(cluster, environ)
    finally:
        if created:
            manager.down(CLUSTER)


@contextlib.contextmanager
def real_npus(needed: int, environ: Mapping[str, str]) -> Iterator[NpuCluster]:
    """Yield the Ray cluster that RAY_ADDRESS names or that runs here; else start one and stop it afterwards."""
    with contextlib.ExitStack() as stack:
        available = _npus_of_ray(environ)
        if available is None:
            stack.enter_context(_own_ray(environ))
            available = _npus_of_ray(environ) or 0
        if needed > available:
            raise DemoError(
                f"TP x PP x DP needs {needed} NPUs, but Ray's cluster has {available}: add nodes (ray start "
                "--address=HEAD:6379 on each), or ask for less, as in SERVE_ARGS='-tp 1 -pp 1' make serve."
            )
        yield NpuCluster(
            f"Ray cluster with {available} NPUs", "127.0.0.1", "127.0.0.1", lambda command: command, environ
        )


def _healthy_cluster() -> Cluster | None:
    with contextlib.suppress(ClusterError):
        cluster, nodes = manager.status(CLUSTER)
        if all(node.alive for node in nodes):
            return cluster
    return None


def _check_enough(needed: int, nodes: int, npus: int) -> None:
    if needed > nodes * npus:
        raise DemoError(
            f"TP x PP x DP needs {needed} NPUs, but the cluster has {nodes} nodes x {npus} = {nodes * npus}: ask for "
            f"less in SERVE_ARGS, or make a larger cluster first (softnpu cluster down --name "
            f"{CLUSTER}, then up --name {CLUSTER} --nodes {nodes} --npus-per-node {-(-needed // nodes)})."
        )


def _shape(needed: int, environ: Mapping[str, str]) -> Shape:
    kind, reason = manager.choose_node_kind()
    if reason:
        print(f"  both nodes share this machine's address: {reason}")
    # As few NPUs as needed: Ray fills a node before it uses the next, and both nodes should take part.
    npus = -(-needed // _NODES)
    return Shape(nodes=_NODES, npus_per_node=npus, memory=environ.get("SOFTNPU_MEMORY", "4G"), kind=kind)


def to_npu_cluster(cluster: Cluster, environ: Mapping[str, str]) -> NpuCluster:
    shape, head = cluster.shape, cluster.nodes[0]
    own_address = shape.kind == "namespaces"
    return NpuCluster(
        description=f"{shape.nodes} nodes x {shape.npus_per_node} software NPUs, Ray at {cluster.ray_address}",
        address=head.address,
        bind="0.0.0.0" if own_address else "127.0.0.1",  # only this machine reaches a node's address
        command=lambda command: manager.node_command(cluster, 1, command),
        environment=manager.command_environment(cluster, 1, environ),
    )


def _npus_of_ray(environ: Mapping[str, str]) -> int | None:
    """Return the NPUs of the reachable Ray cluster; None when there is none."""
    code = "import ray; ray.init('auto', log_to_driver=False); print(int(ray.cluster_resources().get('NPU', 0)))"
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return int(result.stdout.split()[-1])
    if environ.get("RAY_ADDRESS"):
        raise DemoError(f"no Ray cluster answers at RAY_ADDRESS={environ['RAY_ADDRESS']}:\n{result.stderr[-1000:]}")
    return None


@contextlib.contextmanager
def _own_ray(environ: Mapping[str, str]) -> Iterator[None]:
    print("  no Ray cluster runs here: starting one for this machine", flush=True)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    ray = subprocess.Popen(
        [*command, "--include-dashboard=false"], env=environ, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + _RAY_START_LIMIT_S
        while _npus_of_ray(environ) is None:
            if ray.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"`{' '.join(command)}` did not start (exit code {ray.poll()}): run it by hand to see.")
            time.sleep(1)
        yield
    finally:
        ray.terminate()  # with --block it ends what it started
        ray.wait()
