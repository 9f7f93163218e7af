"""Complete prompts with a class of one's own: `python own_class.py MODEL PROMPTS.jsonl FOLDER` on a node."""

import os
import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

NPUS = 2


class Complete:
    """An engine on NPUs of its own."""

    def __init__(self, model: str) -> None:
        self.sampling = SamplingParams(temperature=0, max_tokens=400)
        self.llm = LLM(model, tensor_parallel_size=NPUS, distributed_executor_backend="ray", max_model_len=512)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of prompts with their texts."""
        try:
            outputs = self.llm.generate(list(batch["prompt"]), self.sampling, use_tqdm=False)
        except EngineDeadError:
            os._exit(1)  # Ray Data starts the actor again, in the same placement group, and repeats the batch
        return {"prompt": batch["prompt"], "text": [output.outputs[0].text for output in outputs]}


def reserve_npus() -> dict[str, Any]:
    """Return options of an actor: NPUs for its engine, in a placement group. Ray Data calls it for every actor."""
    group = ray.util.placement_group([{"CPU": 1, "NPU": 1}] * NPUS)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    return {"scheduling_strategy": strategy}


if __name__ == "__main__":
    model, prompts, folder = sys.argv[1:]
    ray.data.read_json(prompts, lines=True, override_num_blocks=8).map_batches(
        Complete,
        fn_constructor_args=(model,),
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        ray_remote_args_fn=reserve_npus,
    ).write_json(folder)
