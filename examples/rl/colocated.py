"""Reinforcement learning on NPUs: a trainer and an engine on the same NPUs, in turns.

`python colocated.py MODEL` on a node of the cluster. Each NPU has a rank of the trainer and a rank of the engine. The
engine sleeps while the trainer works. New weights do not leave the NPU: the engine's rank reads the trainer's memory.
The trainer stands for yours, as in weight_transfer.py: its step zeroes the last layer, and the next one restores it.
"""

import sys
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

PROMPT = "Beautiful is better than ugly.\n"
NPUS = 2
SHARE = 0.5  # of each NPU, for the trainer and for the engine
BUFFER_BYTES = 64 << 20  # through which weights go from the trainer to the engine; 1 GiB by default


class Weights(WeightSource):
    """All weights of the model; with FSDP, gathered one by one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def metadata(self) -> list[ParamMeta]:
        """Return name, type and shape of each weight."""
        return [ParamMeta(name, each.dtype, each.shape) for name, each in self.model.named_parameters()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, each.detach()) for name, each in self.model.named_parameters())


@ray.remote(num_cpus=1, resources={"NPU": SHARE})
class Trainer:
    """One rank of the trainer, with the whole model on its NPU."""

    def __init__(self, model: str) -> None:
        import torch_npu  # noqa: F401
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model).to("npu")
        self.norm = self.model.model.norm.weight
        self.trained = self.norm.detach().clone()

    def rendezvous(self) -> str:
        """Return an address at which the ranks of the trainer can meet: this actor's node, and a free port there."""
        from vllm.utils.network_utils import get_open_port

        return f"tcp://{ray.util.get_node_ip_address()}:{get_open_port()}"

    def join(self, rank: int, address: str, engine: Any) -> None:
        """Meet the other ranks; the first one also speaks to the engine."""
        from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.plugins import load_general_plugins
        from vllm_ascend.distributed.weight_transfer.npu_ipc_engine import NPUIPCTrainerInitInfo

        load_general_plugins()  # vllm-ascend registers npu_ipc
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=NPUS)
        self.transfer = WeightTransferTrainerFactory.trainer_init(
            NPUIPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=BUFFER_BYTES),
            client=RayVLLMWeightSyncClient(engine),
            source=Weights(self.model),
        )

    def step(self, scale: float) -> None:
        """Train: here, scale one layer's weights."""
        self.norm.data.copy_(self.trained * scale)

    def send(self) -> None:
        """Let the engine's rank on this NPU read all weights."""
        self.transfer.send_weights()


def start_trainer(model: str, group: PlacementGroup) -> list[Any]:
    """Start a rank of the trainer in each bundle."""
    places = [InGroup(group, placement_group_bundle_index=rank) for rank in range(NPUS)]
    return [Trainer.options(scheduling_strategy=place).remote(model) for place in places]  # type: ignore[attr-defined]


def start_engine(model: str, group: PlacementGroup) -> Any:
    """Start an engine whose ranks take the rest of the same bundles; return its actor, asleep."""
    variables = {
        "VLLM_RAY_PER_WORKER_GPUS": str(1 - SHARE),
        "VLLM_RAY_BUNDLE_INDICES": ",".join(str(bundle) for bundle in range(NPUS)),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # handles of memory travel through the engine to its ranks
    }
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": InGroup(group, placement_group_capture_child_tasks=True),
        "runtime_env": {"env_vars": variables},
    }
    engine = (
        ray.remote(LLM)
        .options(**options)
        .remote(
            model,
            tensor_parallel_size=NPUS,
            distributed_executor_backend="ray",
            max_model_len=512,
            gpu_memory_utilization=0.4,  # the trainer has the rest, also while the engine starts
            enable_sleep_mode=True,
            weight_transfer_config=WeightTransferConfig(backend="npu_ipc"),
            additional_config={"weight_nz_mode": 0},  # the hardware's own format cannot be changed in place
        )
    )
    ray.get(engine.sleep.remote(level=2))
    return engine


def update(engine: Any, trainer: list[Any]) -> None:
    """Wake the engine with the trainer's weights; the cache comes after them, to save memory."""
    ray.get(engine.wake_up.remote(tags=["weights"]))
    ray.get([rank.send.remote() for rank in trainer])
    ray.get(engine.wake_up.remote(tags=["kv_cache"]))
    ray.get(engine.reset_prefix_cache.remote())  # computed with the old weights


def generate(engine: Any) -> str:
    """Return what the engine makes of the prompt."""
    sampling = SamplingParams(temperature=0, max_tokens=100)
    (answer,) = ray.get(engine.generate.remote(PROMPT, sampling, use_tqdm=False))
    return answer.outputs[0].text


def main(model: str) -> None:
    """Train and generate three times in turns, and print what the engine generates."""
    ray.init()
    group = placement_group([{"NPU": 1, "CPU": 1}] * NPUS)
    ray.get(group.ready())
    trainer, engine = start_trainer(model, group), start_engine(model, group)
    address = ray.get(trainer[0].rendezvous.remote())
    ray.get([each.join.remote(rank, address, engine) for rank, each in enumerate(trainer)])
    for scale in (1.0, 0.0, 1.0):
        ray.get([each.step.remote(scale) for each in trainer])
        update(engine, trainer)
        print(f"scale {scale:g}: {generate(engine)!r}", flush=True)
        ray.get(engine.sleep.remote(level=2))
    remove_placement_group(group)


if __name__ == "__main__":
    main(sys.argv[1])
