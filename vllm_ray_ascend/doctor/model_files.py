"""The files of a model on this node, for `doctor --model PATH`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from vllm_ray_ascend.doctor.records import ModelFiles

_CONFIGS = ("config.json", "params.json")
"""The second is of Mistral's own form."""
_KINDS = {
    ".safetensors": "model.safetensors.index.json",
    ".bin": "pytorch_model.bin.index.json",
    ".pt": "",
    ".gguf": "",
}
"""Files with weights and their index, in the order in which vLLM looks for them."""
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""What a training leaves, which vLLM does not load."""


def model_files(path: str) -> ModelFiles | None:
    """Return what a model's folder has, or its single file: sizes, no weights are read. None where no path is given."""
    if not path:
        return None
    place = Path(path)
    try:
        return ModelFiles(path=path, weights_bytes=place.stat().st_size) if place.is_file() else _model_folder(place)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:  # but the first: of the index
        return ModelFiles(path=path, error=getattr(error, "strerror", None) or str(error))


def _model_folder(folder: Path) -> ModelFiles:
    names = {each.name for each in folder.iterdir()}
    config = next((name for name in _CONFIGS if name in names), _CONFIGS[0])
    index_name, weights = _find_weights(names)
    index = json.loads((folder / index_name).read_bytes()) if index_name and (folder / index_name).exists() else {}
    total = index.get("metadata", {}).get("total_size")
    weights = set(index.get("weight_map", {}).values()) or weights
    sizes = {name: _size(folder / name) for name in weights}
    others = {name: _size(folder / name) for name in (config, index_name) if name}
    return ModelFiles(
        path=str(folder),
        config="" if others[config] is None else hashlib.sha256((folder / config).read_bytes()).hexdigest(),
        index_bytes=None if total is None else int(total),
        weights_bytes=sum(size or 0 for size in sizes.values()),
        missing=sorted(name for name, size in {**sizes, **others}.items() if size is None),
    )


def _size(path: Path) -> int | None:
    """Return a file's size; None where it is not there, or a link that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _find_weights(names: Collection[str]) -> tuple[str, set[str]]:
    """Return the index of the weights that vLLM loads, empty where there is none, and the files that are of their kind.

    An index counts where a file of its kind is there, or no weights at all.
    """
    found = {
        kind: {name for name in names if name.endswith(kind) and not name.endswith(_NO_WEIGHTS)} for kind in _KINDS
    }
    indexes = {kind: index if index in names else "" for kind, index in _KINDS.items()}
    kind = next((kind for kind in _KINDS if found[kind]), next((kind for kind in _KINDS if indexes[kind]), ""))
    return indexes.get(kind, ""), found.get(kind, set())
