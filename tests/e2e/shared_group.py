"""Engines in one placement group, as RLHF trainers place them: each an actor with its own VLLM_RAY_BUNDLE_INDICES.

python -m tests.e2e.shared_group MODEL TP SHARE INDICES [INDICES]      run on a node of a cluster
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.e2e.generate import MARKER


class Engine:
    """An engine in the process of an actor."""

    def __init__(self, model: str, tp: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype="float32",
            tensor_parallel_size=tp,
            distributed_executor_backend="ray",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=4,
            kv_cache_memory_bytes=16 << 20,
            worker_extension_cls="tests.e2e.facts.WorkerFacts",
        )

    def text(self, prompt: str) -> str:
        from vllm import SamplingParams

        outputs = self.llm.generate([prompt], SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
        return str(outputs[0].outputs[0].text)

    def facts(self) -> list[dict[str, Any]]:
        return list(self.llm.collective_rpc("facts"))


def main(model: str, tp: int, share: str, *indices: str) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from demo.train.recitation import PROMPTS

    ray.init("auto")
    bundles = 1 + max(int(index) for chosen in indices for index in chosen.split(","))
    group = ray.util.placement_group([{"NPU": 1.0}] * bundles, strategy="PACK")
    ray.get(group.ready())
    engines: list[Any] = []
    for number, chosen in enumerate(indices):
        if chosen in indices[:number]:  # what the first one holds is known once it runs
            ray.get(engines[0].facts.remote())
        variables = {
            "VLLM_RAY_BUNDLE_INDICES": chosen,
            "VLLM_RAY_PER_WORKER_GPUS": share,
            # The first engine core is a process of its own, as by default: it joins Ray with its actor's runtime_env,
            # by which its workers find this module. The second has no other process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(number == 0)),
            "PYTHONPATH": os.environ["PYTHONPATH"],
        }
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        options = {"num_cpus": 0, "scheduling_strategy": strategy, "runtime_env": {"env_vars": variables}}
        engines.append(ray.remote(Engine).options(**options).remote(model, tp))
    return {
        "facts": ray.get([engine.facts.remote() for engine in engines]),
        "text": ray.get([engine.text.remote(PROMPTS[-1]) for engine in engines]),
        "engines": topology_engines(),
        "bundle_addresses": bundle_addresses(group),
    }


def topology_engines() -> list[dict[str, Any]]:
    """Return the engines that `vllm-ray-ascend topology` shows."""
    command = [sys.executable, "-m", "vllm_ray_ascend.cli.main", "topology", "--json"]
    return list(json.loads(subprocess.check_output(command))["engines"])


def bundle_addresses(group: Any) -> list[str]:
    """Return the address of each bundle's node, as Ray knows it."""
    import ray

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [addresses[nodes[bundle]] for bundle in range(len(nodes))]


if __name__ == "__main__":
    print(MARKER + json.dumps(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])), flush=True)
