"""Reinforcement learning on NPUs: a trainer on one, engines on others that come and go, new weights from NPU to NPU.

`python direct.py MODEL` on a node of the cluster. Each worker of an engine requests the weights from the trainer, so
that an engine may start or end at any time, and no group of all of them is created. The trainer stands for yours, as in
weight_transfer.py: its step zeroes the last layer, and the next one restores it.
"""

import sys
from typing import Any

import ray
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig

PROMPT = "Beautiful is better than ugly.\n"
BACKEND = "hccl_direct"


@ray.remote(num_cpus=1, resources={"NPU": 1})
class Trainer:
    """Holds the model on an NPU of its own; with FSDP, one of several ranks, each with its rank."""

    def __init__(self, model: str) -> None:
        import torch_npu  # noqa: F401
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model).to("npu")
        self.norm = self.model.model.norm.weight
        self.trained = self.norm.detach().clone()

    def connect(self, engines: list[Any]) -> None:
        """Prepare to send weights. The engines may be others later."""
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

        from vllm_ray_ascend.ray_transport.direct.weight_transfer import (
            DirectTrainerInitInfo,
            DirectTrainerWeightTransferEngine,
        )

        self.transfer = DirectTrainerWeightTransferEngine.trainer_init(
            DirectTrainerInitInfo(rank=0),
            client=RayVLLMWeightSyncClient(engines),
            source=ModuleSource(self.model),
        )

    def step(self, scale: float) -> None:
        """Train: here, scale one layer's weights."""
        self.norm.data.copy_(self.trained * scale)

    def send(self, engines: list[Any]) -> None:
        """Let all workers of the engines receive all weights."""
        self.transfer.client.handles = engines
        self.transfer.send_weights()


def start_engine(model: str, workers: int) -> Any:
    """Start an engine with so many workers, each on an NPU of its own; return its actor."""
    return (
        ray.remote(LLM)
        .options(num_cpus=0)
        .remote(
            model,
            tensor_parallel_size=workers,
            distributed_executor_backend="ray",
            max_model_len=512,
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            additional_config={"weight_nz_mode": 0},  # the hardware's own format cannot be changed in place
        )
    )


def generate(engine: Any) -> str:
    """Return what an engine makes of the prompt."""
    ray.get(engine.reset_prefix_cache.remote())  # computed with the weights of before
    sampling = SamplingParams(temperature=0, max_tokens=100)
    (answer,) = ray.get(engine.generate.remote(PROMPT, sampling, use_tqdm=False))
    return answer.outputs[0].text


def main(model: str) -> None:
    """Update an engine twice, then that one and a further one, and print what they generate."""
    ray.init()
    trainer = Trainer.remote(model)  # type: ignore[attr-defined]
    engines = [start_engine(model, workers=2)]
    ray.get(trainer.connect.remote(engines))
    for scale in (1.0, 0.0, 1.0):
        ray.get(trainer.step.remote(scale))
        ray.get(trainer.send.remote(engines))
        for engine in engines:
            print(f"scale {scale:g}: {generate(engine)!r}", flush=True)
        if scale == 0.0:
            engines.append(start_engine(model, workers=1))


if __name__ == "__main__":
    main(sys.argv[1])
