"""Collect the facts of every node of the joined Ray cluster: one short task per node, all in parallel, and no actor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from vllm_ray_ascend.cluster.node_facts import NodeFacts, collect_node_facts, node_facts_from_dict

_LIMIT_S = 20.0


class ProbeResults(NamedTuple):
    """Facts by node id, and for nodes that returned none, the reason."""

    facts: dict[str, NodeFacts]
    failures: dict[str, str]


class Answer(NamedTuple):
    """What a function returned on a node, and when it was sent there and had come back, by this node's clock."""

    value: Any
    sent: float
    received: float


class NodeAnswers(NamedTuple):
    """Answers by node id, and for nodes that gave none, the reason."""

    answers: dict[str, Answer]
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
    arguments = {node_id: (address,) for node_id, address in addresses.items()}
    found = run_on_nodes(_collect_as_dict, node_facts_from_dict, arguments, limit_s)
    return ProbeResults({node_id: answer.value for node_id, answer in found.answers.items()}, found.failures)


def run_on_nodes(
    function: Callable[..., Any],
    decode: Callable[[Any], Any],
    arguments: Mapping[str, tuple[Any, ...]],
    limit_s: float,
) -> NodeAnswers:
    """Call ``function`` on each node, by node id with its arguments; wait at most ``limit_s`` seconds for all of them.

    It returns plain data, which ``decode`` reads here: nodes may have other versions of this package.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    sent = time.time()
    pending = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(*each): node_id
        for node_id, each in arguments.items()
    }
    results = NodeAnswers({}, {})
    deadline = time.monotonic() + limit_s
    while pending and (done := ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))[0]):
        received = time.time()
        for ref in done:
            node_id = pending.pop(ref)
            try:
                results.answers[node_id] = Answer(decode(ray.get(ref)), sent, received)
            except Exception as error:  # noqa: BLE001  any error, even of unpickling, is that node's: a finding
                text = str(error).strip() or repr(error)
                results.failures[node_id] = text.splitlines()[-1]  # Ray puts a whole traceback before it
    for ref, node_id in pending.items():
        ray.cancel(ref, force=True)
        results.failures[node_id] = f"no answer within {limit_s:g} s"
    return results


def _collect_as_dict(address: str) -> dict[str, Any]:
    return asdict(collect_node_facts(address))
