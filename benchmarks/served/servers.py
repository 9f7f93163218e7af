"""`vllm serve` of one layout with each executor, and what each node has to be started with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster, Shape

from benchmarks.cluster import LOGS, ROOT
from benchmarks.options import BenchError
from benchmarks.served.options import Case
from demo.cluster import to_npu_cluster
from demo.options import DemoError
from demo.options import Options as ServeOptions
from demo.server import QUIET, Server
from demo.train.recitation import DENSE

MODEL = str(DENSE)
PORT = 8000
_MASTER_PORT = "29511"
_RPC_PORT = "29550"


def node_arguments(case: Case, executor: str, head: str) -> list[list[str]]:
    """Return the arguments of `vllm serve` on each node that has to run one; ``head``: address of the first node."""
    over_ray = executor != "mp"
    common = [
        *("--tensor-parallel-size", str(case.tp), "--pipeline-parallel-size", str(case.pp)),
        *("--distributed-executor-backend", "ray" if over_ray else "mp"),
    ]
    if case.dp > 1:
        common += ["--data-parallel-size", str(case.dp), "--data-parallel-size-local", str(case.dp // case.nodes)]
        common += ["--data-parallel-address", head]
    if over_ray:
        return [[*common, *(("--data-parallel-backend", "ray") if case.dp > 1 else ())]]
    if case.nodes == 1:
        return [common]
    return [[*common, *_node_of_mp(case, rank, head), *(("--headless",) if rank else ())] for rank in range(case.nodes)]


def _node_of_mp(case: Case, rank: int, head: str) -> list[str]:
    if case.dp > 1:
        first = rank * case.dp // case.nodes
        return ["--data-parallel-rpc-port", _RPC_PORT, *(("--data-parallel-start-rank", str(first)) if rank else ())]
    return [
        *("--nnodes", str(case.nodes), "--node-rank", str(rank)),
        *("--master-addr", head, "--master-port", _MASTER_PORT),
    ]


@contextlib.contextmanager
def serve(case: Case, executor: str, number: int) -> Iterator[tuple[Cluster, str]]:
    """Yield a new cluster on which ``executor`` serves, and the server's URL."""
    name = f"served-{os.getpid() % 100000}-{number}"
    kind, reason = manager.choose_node_kind()
    if reason:
        raise BenchError(f"Servers need nodes with addresses of their own, and there are none here: {reason}")
    shape = Shape(nodes=case.nodes, npus_per_node=case.npus_per_node, cpus_per_node=2, kind=kind)
    cluster, _ = manager.up(name, shape, settings={}, report=lambda _: None)
    try:
        with contextlib.ExitStack() as stack:
            head = cluster.nodes[0].address
            servers = [
                stack.enter_context(_server(cluster, case, executor, rank, arguments))
                for rank, arguments in enumerate(node_arguments(case, executor, head))
            ]
            _wait_until_healthy(servers)
            yield cluster, servers[0].url
    finally:
        manager.down(name)


def _wait_until_healthy(servers: Sequence[Server]) -> None:
    """Wait for the first, which has the API. Raises BenchError where it never gets healthy, or another has ended."""
    try:
        servers[0].wait_until_healthy()
        for server in servers:
            server.check()
    except DemoError as error:
        raise BenchError(f"{error}\nLogs: {', '.join(str(server.log) for server in servers)}") from error


def _server(cluster: Cluster, case: Case, executor: str, node_rank: int, arguments: list[str]) -> Server:
    own = {"VLLM_RAY_ASCEND_EXECUTOR": executor} if executor != "mp" else {}
    address = cluster.nodes[node_rank].address
    variables = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "VLLM_HOST_IP": address, **own}
    node = dataclasses.replace(
        to_npu_cluster(cluster, {}),
        address=address,
        command=lambda command: manager.node_command(cluster, node_rank + 1, command),
        environment=manager.command_environment(cluster, node_rank + 1, variables),
    )
    options = ServeOptions(MODEL, PORT, (*arguments, "--no-enable-prefix-caching"), once=True, npus=case.npus_per_node)
    return Server(options, node, LOGS / f"served-{case.name}-{executor}-{node_rank}.log")
