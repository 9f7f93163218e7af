"""What Transformers says on the CPU of a model whose weights were changed: scaled in place, or with an adapter merged.

    python -m tests.e2e.parity.reference MODEL FOLDER [scaled] [north] [south]

writes FOLDER/changed.json and the adapters that vLLM shall load, of the changes that are named. A process of its own,
for torch_npu must stay out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FACTORS = {"model.layers.1.mlp.down_proj.weight": -1.0, "model.layers.3.self_attn.o_proj.weight": -0.5}
"""Weights of the first and of the last pipeline stage, split over tensor parallel ranks; all factors are exact."""

SCALED = "scaled"
ADAPTERS = ("north", "south")
RANK, ALPHA = 8, 16
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def make_adapter(model: Any, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Write a random adapter as PEFT does; what it adds to each weight."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for name, module in model.named_modules():
        if not name.endswith(MODULES):
            continue
        down = torch.randn(RANK, module.in_features, generator=random) / module.in_features**0.5
        up = torch.randn(module.out_features, RANK, generator=random) / RANK**0.5 / 4
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        added[f"{name}.weight"] = ALPHA / RANK * up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    targets = [module.rpartition(".")[2] for module in MODULES]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    return added


def main(model_dir: Path, folder: Path, names: list[str]) -> None:
    from demo.train.reference import greedy, load, stored_reference

    probes = stored_reference(model_dir, "float32", "probe")
    _, model = load(model_dir, "float32")
    weights = dict(model.named_parameters())
    found: dict[str, list[dict[str, Any]]] = {}
    for change in names:
        if change == SCALED:
            added = {name: weights[name].data * (factor - 1) for name, factor in FACTORS.items()}
        else:
            added = make_adapter(model, folder / change, ADAPTERS.index(change))
        kept = {name: weights[name].data.clone() for name in added}
        for name, value in added.items():
            weights[name].data.add_(value)
        found[change] = []
        for probe in probes:
            decoded = greedy(model, probe["prompt_tokens"], len(probe["tokens"]))
            found[change].append({**probe, "tokens": decoded.tokens, "logprobs": decoded.logprobs})
        for name, value in kept.items():
            weights[name].data.copy_(value)
    (folder / "changed.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
