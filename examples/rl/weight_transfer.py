"""Reinforcement learning on NPUs: a trainer on one, an engine on two others, new weights over HCCL.

`python weight_transfer.py MODEL` on a node of the cluster. The trainer stands for yours: its step zeroes the last
layer, and its second one restores it, so that the texts show which weights the engine has.
"""

import sys
from typing import Any

import ray
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig

PROMPT = "Beautiful is better than ugly.\n"
WORKERS = 2


@ray.remote(num_cpus=1, resources={"NPU": 1})
class Trainer:
    """Holds the model on an NPU of its own; rank 0 of the group through which weights are sent."""

    def __init__(self, model: str) -> None:
        import torch_npu  # noqa: F401
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model).to("npu")
        self.norm = self.model.model.norm.weight
        self.trained = self.norm.detach().clone()

    def step(self, scale: float) -> None:
        """Train: here, scale one layer's weights."""
        self.norm.data.copy_(self.trained * scale)

    def rendezvous(self) -> tuple[str, int]:
        """Return the address of this actor's node, and a free port there."""
        from vllm.utils.network_utils import get_open_port

        return ray.util.get_node_ip_address(), get_open_port()

    def join(self, **init_info: Any) -> None:
        """Connect to the engine's workers, which do the same meanwhile."""
        from vllm_ascend.distributed.weight_transfer.hccl_engine import HCCLWeightTransferEngine as Engine

        self.group = Engine.trainer_init(init_info)

    def describe(self) -> dict[str, list[Any]]:
        """Return names, types and shapes of all parameters, in the order in which they are sent."""
        parameters = list(self.model.named_parameters())
        return {
            "names": [name for name, _ in parameters],
            "dtype_names": [str(parameter.dtype).removeprefix("torch.") for _, parameter in parameters],
            "shapes": [list(parameter.shape) for _, parameter in parameters],
        }

    def send(self) -> None:
        """Send all weights to the workers, which receive meanwhile."""
        import torch
        from vllm_ascend.distributed.weight_transfer.hccl_engine import HCCLWeightTransferEngine as Engine

        Engine.trainer_send_weights(
            ((name, parameter.data) for name, parameter in self.model.named_parameters()),
            {"group": self.group, "packed": True},
        )
        torch.npu.synchronize()


def update(llm: LLM, trainer: Any) -> None:
    """Replace the engine's weights by the trainer's."""
    update_info = {**ray.get(trainer.describe.remote()), "packed": True}
    llm.start_weight_update()
    sent = trainer.send.remote()  # from here on the trainer waits for the engine, and answers nothing else
    llm.update_weights({"update_info": update_info})
    ray.get(sent)
    llm.finish_weight_update()
    llm.reset_prefix_cache()  # computed with the old weights


def generate(llm: LLM) -> str:
    """Return what the engine makes of the prompt."""
    (answer,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
    return answer.outputs[0].text


def main(model: str) -> None:
    """Update an engine three times, and print what it generates with each."""
    ray.init()
    trainer = Trainer.remote(model)  # type: ignore[attr-defined]
    llm = LLM(
        model,
        tensor_parallel_size=WORKERS,
        distributed_executor_backend="ray",
        max_model_len=512,
        weight_transfer_config=WeightTransferConfig(backend="hccl"),
        additional_config={"weight_nz_mode": 0},  # the hardware's own format cannot be changed in place
    )
    address, port = ray.get(trainer.rendezvous.remote())
    group = {"master_address": address, "master_port": port, "world_size": 1 + WORKERS}
    joined = trainer.join.remote(**group)
    llm.init_weight_transfer_engine({"init_info": {**group, "rank_offset": 1}})
    ray.get(joined)
    for scale in (1.0, 0.0, 1.0):
        ray.get(trainer.step.remote(scale))
        update(llm, trainer)
        print(f"scale {scale:g}: {generate(llm)!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
