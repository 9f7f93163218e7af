"""Paths of models and adapters: workers run in another folder, and on other nodes."""

from __future__ import annotations

import os
from typing import Any

_OF_MODELS = ("model", "tokenizer", "hf_config_path")


def absolute_if_here(path: str) -> str:
    """Return a relative ``path`` that exists here as an absolute one; anything else, such as a hub's name, as it is."""
    return os.path.abspath(path) if not os.path.isabs(path) and os.path.exists(path) else path


def use_absolute_paths(vllm_config: Any) -> None:
    """Make paths of a vLLM config absolute that are relative to this process's folder.

    A worker in another folder would look for them on a hub.
    """
    speculation = getattr(vllm_config, "speculative_config", None)
    fields: list[tuple[Any, tuple[str, ...]]] = [
        (model, _OF_MODELS) for model in (vllm_config.model_config, getattr(speculation, "draft_model_config", None))
    ]
    fields += [(speculation, ("model",)), (getattr(vllm_config, "load_config", None), ("download_dir",))]
    for config, names in fields:
        for name in names:
            if isinstance(path := getattr(config, name, None), str):
                setattr(config, name, absolute_if_here(path))


def missing_path(model: str, address: str) -> str | None:
    """Return that the folder of ``model`` is not on this node, at ``address``; None where it is, or is a hub's name."""
    if not os.path.isabs(model) or os.path.exists(model):
        return None
    return (
        f"node {address} has no {model}, from which the engine loads its model: copy or mount it there under the same "
        "path on every node, or serve a model by its name on a hub"
    )


def missing_extension(class_name: str, error: Exception, address: str) -> str | None:
    """Return that the module of a worker extension class is not on this node; None where ``error`` is about another."""
    name = (error.name if isinstance(error, ModuleNotFoundError) else None) or ""
    if not name or not f"{class_name}.".startswith(f"{name}."):
        return None
    return (
        f"node {address} has no module {name} for --worker-extension-cls {class_name}: workers start in another folder "
        'than the script, so send its folder along with ray.init(runtime_env={"working_dir": "."}) or `ray job submit '
        "--working-dir .`, or install the module on every node"
    )
