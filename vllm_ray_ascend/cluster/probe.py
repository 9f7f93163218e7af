"""Collect the facts of every node of the joined Ray cluster: one short task per node, all in parallel, and no actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from vllm_ray_ascend.cluster.node_facts import NodeFacts, collect_node_facts, node_facts_from_dict

_LIMIT_S = 20.0


class ProbeResults(NamedTuple):
    """Facts by node id, and for nodes that returned none, the reason."""

    facts: dict[str, NodeFacts]
    failures: dict[str, str]


def probe_cluster(limit_s: float = _LIMIT_S) -> dict[str, NodeFacts]:
    """Return the facts of all live nodes that answered within ``limit_s`` seconds, by node id."""
    return probe_nodes(live_node_addresses(), limit_s).facts


def live_node_addresses() -> dict[str, str]:
    """Return Ray's address of each live node, by its id. A driver's own may differ, where Ray's is a loopback one."""
    import ray

    return {str(row["NodeID"]): str(row["NodeManagerAddress"]) for row in ray.nodes() if row["Alive"]}


def probe_nodes(addresses: Mapping[str, str], limit_s: float = _LIMIT_S) -> ProbeResults:
    """Collect facts on the nodes of ``addresses``, by node id; wait at most ``limit_s`` seconds for all of them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_collect_as_dict)
    refs = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(address): node_id
        for node_id, address in addresses.items()
    }
    results = ProbeResults({}, {})
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=limit_s) if refs else ([], [])
    for ref in done:
        try:
            results.facts[refs[ref]] = node_facts_from_dict(ray.get(ref))
        except Exception as error:  # noqa: BLE001  any error, even of unpickling, is that node's and becomes a finding
            text = str(error).strip() or repr(error)
            results.failures[refs[ref]] = text.splitlines()[-1]  # Ray puts a whole traceback before it
    for ref in late:
        ray.cancel(ref, force=True)
        results.failures[refs[ref]] = f"no answer within {limit_s:g} s"
    return results


def _collect_as_dict(address: str) -> dict[str, Any]:
    return asdict(collect_node_facts(address))
