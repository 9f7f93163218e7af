"""Updates of an engine's weights that fail, and the ones after them: `python -m tests.e2e.weight_updates MODEL`.

A trainer and engines as in examples/rl/direct.py; prints what an engine generates after each update that succeeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import ray
import torch
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ModuleSource

PROMPT = "Beautiful is better than ugly.\n"
CHUNK_BYTES = 1 << 16
"""A layer has several parts."""


class Source(ModuleSource):  # type: ignore[misc]
    """Raises after ``most`` weights."""

    most = 1 << 30

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, weight in enumerate(super().__iter__()):
            if index == self.most:
                raise ArithmeticError("the trainer's own error")
            yield weight


@ray.remote(num_cpus=1, resources={"NPU": 1})
class Trainer:
    """Sends the weights of ``model``, of which one layer is scaled."""

    def __init__(self, model: str, engines: list[Any]) -> None:
        import torch_npu  # noqa: F401
        from transformers import AutoModelForCausalLM
        from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.plugins import load_general_plugins

        from vllm_ray_ascend.ray_transport.direct.weight_transfer import DirectTrainerInitInfo

        load_general_plugins()
        loaded: Any = AutoModelForCausalLM.from_pretrained(model)
        self.model = loaded.to("npu")
        self.norm = self.model.model.norm.weight
        self.trained = self.norm.detach().clone()
        self.source = Source(self.model)
        info = DirectTrainerInitInfo(rank=0, chunk_bytes=CHUNK_BYTES)
        client = RayVLLMWeightSyncClient(engines)
        self.transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)

    def send(self, engines: list[Any], scale: float, most: int = 1 << 30) -> str:
        """Send the weights; return the error, if there is one."""
        self.norm.data.copy_(self.trained * scale)
        self.source.most, self.transfer.client.handles = most, engines
        try:
            self.transfer.send_weights()
        except Exception as error:  # noqa: BLE001  whatever it is, the test compares it
            return f"{type(error).__name__}: {error}"
        return ""

    def count(self) -> int:
        """Return how many weights there are."""
        return len(self.source.metadata())


def start_engine(model: str, workers: int) -> Any:
    options: dict[str, Any] = {
        "tensor_parallel_size": workers,
        "distributed_executor_backend": "ray",
        "max_model_len": 512,
        "enforce_eager": True,
        "weight_transfer_config": WeightTransferConfig(backend="hccl_direct"),
        "additional_config": {"weight_nz_mode": 0},
    }
    return ray.remote(LLM).options(num_cpus=0).remote(model, **options)


def generate(engine: Any) -> str:
    ray.get(engine.reset_prefix_cache.remote())
    (answer,) = ray.get(engine.generate.remote(PROMPT, SamplingParams(temperature=0, max_tokens=100), use_tqdm=False))
    text: str = answer.outputs[0].text
    return text


def show(event: str, error: str, *engines: Any) -> None:
    for text in map(generate, engines):
        print(f"UPDATE {(event, error, text)!r}", flush=True)


def main(model: str) -> None:
    ray.init()
    first, second = engines = [start_engine(model, 2), start_engine(model, 1)]
    trainer = Trainer.remote(model, engines)  # type: ignore[attr-defined]
    show("sent", ray.get(trainer.send.remote(engines, 1.0)), first, second)
    for most in (1, ray.get(trainer.count.remote()) // 2, ray.get(trainer.count.remote()) - 1):
        error = ray.get(trainer.send.remote(engines, 0.0, most))
        assert not ray.get(trainer.send.remote(engines, 1.0))
        show("the trainer fails in an update", error, first, second)
    ray.kill(second)
    error = ray.get(trainer.send.remote(engines, 0.0))
    assert not ray.get(trainer.send.remote([first], 1.0))
    show("an engine is gone", error, first)
    ray.kill(trainer)
    ray.get(first.start_weight_update.remote())
    trainer = Trainer.remote(model, [first])  # type: ignore[attr-defined]
    show("its trainer is gone in an update", ray.get(trainer.send.remote([first], 1.0)), first)


if __name__ == "__main__":
    main(sys.argv[1])
