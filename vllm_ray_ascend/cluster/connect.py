"""Join the Ray cluster and check it, before anything is placed on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cluster.audit import Driver, Finding, findings, refuse, unreachable
from vllm_ray_ascend.cluster.probe import ask
from vllm_ray_ascend.cluster.resources import Node, check_free, check_npus, holders, live_nodes, total_npus
from vllm_ray_ascend.cluster.waiting import until
from vllm_ray_ascend.compat.ray_state import available_per_node
from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.environment.table import early_variables
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.log import get_logger

_CONNECT_S = 5.0

logger = get_logger(__name__)
_logged: set[str] = set()


def connect(parallel_config: Any, address: str | None = None) -> None:
    """Join the cluster at ``address`` as vLLM's initialize_ray_cluster does; nothing where this process is a member.

    Raises RayVersionError where Ray is missing or too old.
    """
    require_ray(installed("ray"))
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, runtime_env=parallel_config.ray_runtime_env)


def join(address: str = "auto") -> None:
    """Join a cluster to look at it: never starts one, and prints nothing of its workers.

    Raises ClusterResourceError where none is there, RayVersionError where Ray is missing or too old.
    """
    require_ray(installed("ray"))
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        _check_listening(address)
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise ClusterResourceError(
            f"Cannot join a Ray cluster at {address} ({error}). Run this on a node of the cluster, or give "
            "--address=HEAD:6379; `ray start --head` starts one."
        ) from error


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def require_npus(needed: int, sizes: Mapping[str, int], wait_s: float, kind: Kind = NPU) -> None:
    """Check that the joined cluster declares ``needed`` NPUs, or GPUs, and has them free, in up to ``wait_s`` seconds.

    ``sizes`` are the options whose product is ``needed``. vLLM itself would wait half an hour for a placement group
    that cannot be. Raises ClusterResourceError, which names NPUs that are there but that Ray was not told of.
    """
    visible = os.environ.get(kind.variable)

    def check() -> None:
        nodes = _nodes(kind)
        check_npus(nodes, needed, sizes, visible, kind=kind)
        check_free(nodes, needed, sizes, _holders(nodes, kind), kind)

    try:
        until(check, wait_s)
    except ClusterResourceError:
        nodes = _nodes(kind)
        if total_npus(nodes) < needed and kind is NPU:
            untold = [str(finding) for _, finding in _audit(nodes) if finding.severity == "error"]
            check_npus(nodes, needed, sizes, visible, untold)
        raise


def audit_nodes(addresses: Collection[str] | None = None) -> None:
    """Compare the NPUs of nodes with what Ray was told: those at ``addresses``, or all, of which an engine may use
    those that declare NPUs. Warnings are logged, each once in a process.

    Raises ClusterResourceError with every error of a node that the engine may use.
    """
    nodes = [node for node in _nodes() if addresses is None or node.address in addresses]
    found = [
        replace(finding, severity="warning") if addresses is None and not node.npus else finding
        for node, finding in _audit(nodes)
    ]
    for warning in refuse(found):
        if (text := str(warning)) not in _logged:
            _logged.add(text)
            logger.warning("%s", text)


def sizes(parallel_config: Any) -> Mapping[str, int]:
    """The options, by their names, whose product is one engine's number of workers."""
    found = {
        "--tensor-parallel-size": parallel_config.tensor_parallel_size,
        "--pipeline-parallel-size": parallel_config.pipeline_parallel_size,
        "--prefill-context-parallel-size": getattr(parallel_config, "prefill_context_parallel_size", 1),
    }
    return {option: size for option, size in found.items() if size > 1} or {"--tensor-parallel-size": 1}


def _nodes(kind: Kind = NPU) -> list[Node]:
    import ray

    return live_nodes(ray.nodes(), available_per_node(), kind)


def _holders(nodes: Sequence[Node], kind: Kind) -> list[str]:
    import ray

    return holders(ray.util.placement_group_table().values(), nodes, kind)


def _audit(nodes: Sequence[Node]) -> list[tuple[Node, Finding]]:
    import ray

    head_address = ray.get_runtime_context().gcs_address
    driver = Driver({"vllm-ray-ascend": __version__, "vllm-ascend": installed("vllm-ascend")}, set(early_variables()))
    answers = ask({node.node_id: node.address for node in nodes})
    found: list[tuple[Node, Finding]] = []
    for node in nodes:
        if (facts := answers.facts.get(node.node_id)) is not None:
            found += [(node, each) for each in findings(facts, node.npus, node.gpus, head_address, driver)]
        elif node.npus or node.gpus:
            found.append((node, unreachable(node.address, node.npus, answers.silent[node.node_id], __version__)))
    return found
