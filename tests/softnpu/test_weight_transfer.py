"""New weights over the direct transport: what a trainer and workers check before anything is sent, and how it is split.

Whole engines that receive them: tests/e2e/test_ray_llm.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ModuleSource

from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.ray_transport.direct.weight_transfer import (
    DirectTrainerInitInfo,
    DirectTrainerWeightTransferEngine,
    DirectWeightTransferEngine,
    split_into_chunks,
)

pytestmark = pytest.mark.softnpu


def weights(*sizes: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer{index}", torch.zeros(size, dtype=torch.uint8)) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        ((), []),
        ((4, 6, 1), [[4, 6], [1]]),
        ((11, 1, 12), [[11], [1], [12]]),
        ((0, 10, 0, 1), [[0, 10, 0], [1]]),
    ],
)
def test_weights_are_sent_in_order_in_parts_of_a_size(sizes: tuple[int, ...], split: list[list[int]]) -> None:
    parts = list(split_into_chunks(weights(*sizes), 10))
    assert [[tensor.nbytes for _, tensor in part] for part in parts] == split
    assert [name for part in parts for name, _ in part] == [name for name, _ in weights(*sizes)]


def test_no_more_is_gathered_than_the_next_part_needs() -> None:
    """FSDP gathers each weight from all ranks, and the whole model may not fit on one NPU."""
    gathered: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(6, 6, 6):
            gathered.append(name)
            yield name, tensor

    parts = split_into_chunks(gather(), 10)
    next(parts)
    assert gathered == ["layer0", "layer1"]


def test_a_part_is_of_one_npu() -> None:
    devices = ["npu:0", "npu:0", "npu:1", "npu:0"]
    parts = split_into_chunks([(device, torch.zeros(1, device=device)) for device in devices], 1000)
    assert [[name for name, _ in part] for part in parts] == [["npu:0", "npu:0"], ["npu:1"], ["npu:0"]]


def test_a_worker_that_is_no_actor_of_ray_is_refused_before_anything_is_sent() -> None:
    config: Any = SimpleNamespace(parallel_config=None, model_config=None)
    model: Any = None
    with pytest.raises(DirectTransportError, match=r"VRA-549.*--distributed-executor-backend ray"):
        DirectWeightTransferEngine(config, config, torch.device("npu", 0), model)


def test_a_trainer_without_weights_is_refused_before_it_asks_the_engine() -> None:
    with pytest.raises(DirectTransportError, match=r"VRA-550.*ModuleSource"):
        DirectTrainerWeightTransferEngine.trainer_init(DirectTrainerInitInfo(rank=0), client=None)


class Divided(ModuleSource):  # type: ignore[misc]
    """Of which this rank holds a part."""

    def held_names(self) -> list[str]:
        return ["weight"]


def test_a_trainer_whose_first_rank_holds_a_part_is_refused() -> None:
    source = Divided(torch.nn.Linear(2, 2))
    with pytest.raises(DirectTransportError, match=r"VRA-551: Divided.held_names\(\) names 1 weights of this rank"):
        DirectTrainerWeightTransferEngine.trainer_init(DirectTrainerInitInfo(rank=0), client=None, source=source)


def test_vllm_knows_the_backend_once_its_plugins_are_loaded() -> None:
    """In a process of its own: the trainer's, which may have imported vLLM's registries before."""
    code = """
import vllm.distributed.weight_transfer.factory as factory
from vllm.plugins import load_general_plugins
load_general_plugins()
for registry in (factory.WeightTransferEngineFactory._registry, factory.WeightTransferTrainerFactory._registry):
    print(registry["hccl_direct"]().__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["DirectWeightTransferEngine", "DirectTrainerWeightTransferEngine"]
