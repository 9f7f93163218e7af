"""A KV connector for tests: caches of prompts through files in a folder that all nodes see.

vLLM's example connector, whose files hold one tensor a layer, for vllm-ascend's layers, which have keys and values
apart: each [blocks, tokens of a block, heads, head size]. It notes in a file what each engine has stored and loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class FolderConnector(ExampleConnector):  # type: ignore[misc]
    """Stores after each layer of a prompt, loads before the first layer."""

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Load the caches of this step's prompts that another engine has stored."""
        for request, name in self._requests(stores=False, names=list(forward_context.no_compile_layers)):
            caches = getattr(forward_context.no_compile_layers[name], "kv_cache", None)
            if not isinstance(caches, tuple):
                continue
            stored = load_file(self._generate_filename_debug(name, request.token_ids, request.mm_hashes))
            for cache, key in zip(caches, ("keys", "values"), strict=True):
                cache[self._places(request, cache)] = stored[key].to(cache.device)
            self._note("loaded", name, len(request.slot_mapping))

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Store the caches of this step's new prompts, of one layer."""
        for request, name in self._requests(stores=True, names=[layer_name]):
            tensors: dict[str, torch.Tensor] = {}
            for cache, key in zip(kv_layer, ("keys", "values"), strict=True):
                tensors[key] = cache[self._places(request, cache)].cpu().contiguous()
            save_file(tensors, self._generate_filename_debug(name, request.token_ids, request.mm_hashes))
            self._note("stored", name, len(request.slot_mapping))

    def _places(self, request: Any, cache: torch.Tensor) -> tuple[Any, ...]:
        """Return the index of a request's tokens: heads are before or after the tokens of a block."""
        slots = request.slot_mapping.to(cache.device)
        block, token = slots // self._block_size, slots % self._block_size
        return (block, token) if cache.shape[1] == self._block_size else (block, slice(None), token)

    def _requests(self, *, stores: bool, names: list[str]) -> Iterator[tuple[Any, str]]:
        for request in self._get_connector_metadata().requests:
            if request.is_store is stores and len(request.slot_mapping):
                yield from ((request, name) for name in names)

    def _note(self, what: str, layer: str, tokens: int) -> None:
        config = self._kv_transfer_config
        with Path(config.get_from_extra_config("notes", None)).open("a") as file:
            file.write(f"{config.kv_role} {what} {layer} {tokens} {os.uname().nodename}\n")
