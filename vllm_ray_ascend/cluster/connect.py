"""Join the Ray cluster and check it, before anything is placed on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_ray_ascend import __version__
from vllm_ray_ascend.addresses import join_host_port, split_host_port
from vllm_ray_ascend.cluster.audit import Driver, audit_node, unreachable_finding
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.growth import place_with_growth
from vllm_ray_ascend.cluster.placement_groups import PlacementGroupSpec, current_nodes
from vllm_ray_ascend.cluster.probe import probe_nodes
from vllm_ray_ascend.cluster.ray_address import LOCAL, choose_address, no_raylet_message
from vllm_ray_ascend.cluster.resources import (
    NodeResources,
    check_declared_npus,
    check_free_npus,
    drained_nodes,
    leaving_nodes,
    npu_holders,
    total_npus,
)
from vllm_ray_ascend.compat.ray_processes import local_raylets, needs_local_raylet, recorded_address
from vllm_ray_ascend.compat.start_method import RAY_ADDRESS
from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.environment.table import early_variables
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import is_set, load

_CONNECT_S = 5.0
_DEFAULT_PORT = 6379

logger = get_logger(__name__)


def connect(parallel_config: Any, address: str | None = None) -> None:
    """Join the cluster at ``address`` as vLLM's initialize_ray_cluster does; do nothing where Ray is initialized.

    Where Ray would start a cluster of its own beside one that runs on this machine, that one is joined.
    Raises RayVersionError where Ray is missing or too old, ClusterResourceError where no engine can start here.
    """
    require_ray(installed("ray"))
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given = os.environ.get(RAY_ADDRESS) or address if address in (None, "auto") else address  # as ray.init() does
    chosen = choose_address(given, recorded_address(), local_raylets(), needs_local_raylet())
    if chosen != given:
        logger.warning(
            "VRA-355: %s is not set: joining the Ray cluster at %s, which runs on this machine. %s=%s starts one of "
            "its own, whose engines may open the same NPUs",
            RAY_ADDRESS,
            chosen,
            RAY_ADDRESS,
            LOCAL,
        )
    if parallel_config.ray_runtime_env:  # that of the script, with its job's in it, which Ray would take for a conflict
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    ray.init(address=chosen, runtime_env=parallel_config.ray_runtime_env)
    _check_node_is_here()


def _check_node_is_here() -> None:
    """Raise ClusterResourceError where Ray takes a node of another machine for this one, as 2.60 does beside none."""
    import ray

    address, cluster = str(ray.util.get_node_ip_address()), ray.get_runtime_context().gcs_address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        ray.shutdown()
        raise ClusterResourceError(
            "VRA-356",
            f"This machine has no address {address}, by which Ray knows its node. {no_raylet_message(cluster)}",
        ) from error


def connect_as_observer(address: str = "auto") -> None:
    """Join a running cluster to inspect it: never start one, and print nothing of its workers.

    Raises ClusterResourceError where no cluster is there, RayVersionError where Ray is missing or too old.
    """
    require_ray(installed("ray"))
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    address = _with_port(address)
    try:
        _check_listening(address)
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise ClusterResourceError(
            "VRA-227",
            f"Cannot join a Ray cluster at {address} ({error}). Run this on a node of the cluster, or give "
            "--address=HEAD:6379; `ray start --head` starts one.",
        ) from error


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, port = split_host_port(address)
    if host and port.isdecimal() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def _with_port(address: str) -> str:
    """Return the address of a cluster as Ray takes it: with the port, and brackets around an IPv6 address."""
    host, port = split_host_port(address)
    if "//" in address or (not port and host in ("", "auto", "local")):
        return address
    return join_host_port(host, port or _DEFAULT_PORT)


def require_npus(
    needed: int,
    sizes: Mapping[str, int],
    wait_s: float | None = None,
    kind: Kind = NPU,
    demand: Sequence[PlacementGroupSpec] = (),
    share: float = 1.0,
) -> None:
    """Wait up to ``wait_s`` seconds until the joined cluster has ``needed`` free NPUs, or GPUs.

    ``sizes`` are the options whose product is ``needed``. The groups of ``demand`` are created where an autoscaler can
    meet them. ``share`` is the part of an NPU that each worker takes. vLLM itself would wait half an hour for a
    placement group that is impossible, whether there is one or not.
    Raises ClusterResourceError, which names NPUs that exist but are not declared to Ray.
    """
    visible_devices = os.environ.get(kind.variable)

    def check(groups: Sequence[Any]) -> None:
        nodes = current_nodes(kind, groups)
        check_declared_npus(nodes, needed, sizes, visible_devices, kind=kind, leaving=_leaving_nodes(nodes))
        check_free_npus(nodes, needed, sizes, _npu_holders(nodes, kind), kind, share)

    try:
        place_with_growth(check, lambda: demand, lambda: npu_wait_s(needed, kind) if wait_s is None else wait_s)
    except ClusterResourceError:
        nodes = current_nodes(kind)
        if total_npus(nodes) < needed and kind is NPU:
            errors = [str(finding) for finding in _collect_findings(nodes) if finding.severity == "error"]
            if errors:
                check_declared_npus(nodes, needed, sizes, visible_devices, errors, leaving=_leaving_nodes(nodes))
        raise


def npu_wait_s(needed: int, kind: Kind = NPU) -> float:
    """Return the seconds to wait for ``needed`` NPUs: none where they are missing because nodes drain.

    What the user has set holds in any case.
    """
    nodes = current_nodes(kind)
    gone = total_npus(nodes) < needed and _leaving_nodes(nodes)
    return 0.0 if gone and not is_set("npu_wait_s") else load().npu_wait_s


def parallel_sizes(parallel_config: Any) -> Mapping[str, int]:
    """Return the options, by their names, whose product is one engine's number of workers."""
    sizes = {
        "--tensor-parallel-size": parallel_config.tensor_parallel_size,
        "--pipeline-parallel-size": parallel_config.pipeline_parallel_size,
        "--prefill-context-parallel-size": getattr(parallel_config, "prefill_context_parallel_size", 1),
    }
    return {option: size for option, size in sizes.items() if size > 1} or {"--tensor-parallel-size": 1}


def this_driver() -> Driver:
    """Return what nodes are compared with where this process is the driver."""
    return Driver({"vllm-ray-ascend": __version__, "vllm-ascend": installed("vllm-ascend")}, set(early_variables()))


def _leaving_nodes(nodes: Sequence[NodeResources]) -> list[str]:
    import ray

    return leaving_nodes(nodes, drained_nodes(ray.nodes()))


def _npu_holders(nodes: Sequence[NodeResources], kind: Kind) -> list[str]:
    import ray

    return npu_holders(ray.util.placement_group_table().values(), nodes, kind)


def _collect_findings(nodes: Sequence[NodeResources]) -> list[Finding]:
    import ray

    head_address = ray.get_runtime_context().gcs_address
    driver = this_driver()
    results = probe_nodes({node.node_id: node.address for node in nodes})
    found: list[Finding] = []
    for node in nodes:
        if (facts := results.facts.get(node.node_id)) is not None:
            found += audit_node(facts, node.npus, node.gpus, head_address, driver)
        elif node.npus or node.gpus:
            reason = results.failures[node.node_id]
            found.append(unreachable_finding(node.address, node.npus, reason, __version__))
    return found
