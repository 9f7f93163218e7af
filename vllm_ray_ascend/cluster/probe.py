"""Ask every node of the joined Ray cluster what NPUs it has: one short task a node, all at once, and no actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from vllm_ray_ascend.cluster.node_facts import NodeFacts, collect, facts_of

_LIMIT_S = 20.0


class Answers(NamedTuple):
    """Facts by node id, and for nodes that gave none, why not."""

    facts: dict[str, NodeFacts]
    silent: dict[str, str]


def probe(node_ids: Mapping[str, str] | None = None, limit_s: float = _LIMIT_S) -> list[NodeFacts]:
    """Facts of the nodes that answered within ``limit_s`` seconds. ``node_ids`` gives their addresses; None is all."""
    import ray

    if node_ids is None:
        node_ids = {row["NodeID"]: str(row["NodeManagerAddress"]) for row in ray.nodes() if row["Alive"]}
    return list(ask(node_ids, limit_s).facts.values())


def ask(node_ids: Mapping[str, str], limit_s: float = _LIMIT_S) -> Answers:
    """Ask the nodes with these ids and addresses. Nobody waits longer than ``limit_s`` seconds for a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_collect)
    refs = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(address): node_id
        for node_id, address in node_ids.items()
    }
    answers = Answers({}, {})
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=limit_s) if refs else ([], [])
    for ref in done:
        try:
            answers.facts[refs[ref]] = facts_of(ray.get(ref))
        except Exception as error:  # noqa: BLE001  whatever it is, it is that node's, and is told
            text = str(error).strip() or repr(error)
            answers.silent[refs[ref]] = text.splitlines()[-1]  # Ray puts a whole traceback before it
    for ref in late:
        ray.cancel(ref, force=True)
        answers.silent[refs[ref]] = f"no answer within {limit_s:g} s"
    return answers


def _collect(address: str) -> dict[str, Any]:
    return asdict(collect(address))
