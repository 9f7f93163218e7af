"""LoRA adapters whose files are gone after they were loaded: the request that needs them fails, not the engine.

A worker keeps the last --max-cpu-loras adapters and reads any other one again in the step that needs it. vLLM ends the
engine where that fails. So the API server asks all workers for the files before it passes such a request on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.environment.paths import absolute_if_here
from vllm_ray_ascend.errors import AdapterError
from vllm_ray_ascend.settings import load

CHECK = "check_adapter"
"""Method of a worker, with the name and the path of an adapter."""
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_ERROR = f"{AdapterError.__name__}: "
"""Stands before a worker's own text in the error that the API server receives."""

AsyncMethod = Callable[..., Awaitable[Any]]
_uses: weakref.WeakKeyDictionary[Any, AdapterUse] = weakref.WeakKeyDictionary()
"""Of each AsyncLLM in this process."""


@dataclasses.dataclass
class AdapterUse:
    """Which adapters, by their ids, one API server has had loaded, and which workers may have read."""

    loaded: set[int] = dataclasses.field(default_factory=set)
    used: set[int] = dataclasses.field(default_factory=set)
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """What a path meant at the load: one that is relative may be gone later, and look like a hub's name."""

    def may_be_read_again(self, adapter: int, capacity: int) -> bool:
        """Return whether a worker, which keeps ``capacity`` adapters, may have to read this one for a request."""
        return adapter not in self.loaded or len(self.used | {adapter}) > capacity


def missing_files(path: str) -> str | None:
    """Return which file of an adapter is not in the folder ``path``; None where all are, or for a hub's name."""
    folder = os.path.expanduser(path)
    if not os.path.isabs(folder):
        return None
    if not os.path.isfile(os.path.join(folder, _CONFIG)):
        return _CONFIG
    return None if any(os.path.isfile(os.path.join(folder, name)) for name in _WEIGHTS) else _WEIGHTS[0]


def check_adapter(name: str, path: str, address: str) -> None:
    """Raise AdapterError where this node, at ``address``, does not have the files of adapter ``name``."""
    if missing := missing_files(path):
        raise AdapterError(
            "VRA-387",
            f"LoRA adapter {name} cannot be loaded again: node {address} has no {missing} in {path}. Copy or mount the "
            "adapter there under the same path on every node, or keep more of them loaded (--max-cpu-loras).",
        )


def check_before_requests(is_active: Callable[[], bool]) -> None:
    """Let vLLM's AsyncLLM refuse requests over Ray for adapters whose files are gone, where workers are ours.

    ``is_active`` says whether they are. Errors are those of `patches.wrap`.
    """
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.add_lora", _record_load)
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.add_request", functools.partial(_check_first, is_active))


def _record_load(add_lora: AsyncMethod) -> AsyncMethod:
    @functools.wraps(add_lora)
    async def add(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
        use, adapter = _use(self), lora_request.lora_int_id
        given, path = lora_request.lora_path, absolute_if_here(lora_request.lora_path)
        use.used.add(adapter)  # where one worker fails, others have it in another one's place
        result = await add_lora(self, lora_request, *args, **kwargs)
        use.loaded.add(adapter)
        use.paths[given] = path
        return result

    return add


def _check_first(is_active: Callable[[], bool], add_request: AsyncMethod) -> AsyncMethod:
    parameters = inspect.signature(add_request)

    @functools.wraps(add_request)
    async def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = parameters.bind(self, *args, **kwargs).arguments.get("lora_request")
        if adapter is not None and _is_over_ray(self) and is_active():
            use = _use(self)
            # Tensorizer's, up to vLLM 0.31, say themselves where they are, maybe in an object store.
            has_files = not getattr(adapter, "tensorizer_config_dict", None)
            capacity = 0 if getattr(adapter, "load_inplace", False) else _capacity(self)  # read in every step
            if has_files and use.may_be_read_again(adapter.lora_int_id, capacity):
                path = use.paths.get(adapter.lora_path) or absolute_if_here(adapter.lora_path)
                await _ask_workers(self, adapter.lora_name, path)
            use.used.add(adapter.lora_int_id)
        return await add_request(self, *args, **kwargs)

    return add


def _use(engine: Any) -> AdapterUse:
    return _uses.setdefault(engine, AdapterUse())


def _is_over_ray(engine: Any) -> bool:
    return bool(engine.vllm_config.parallel_config.distributed_executor_backend == "ray")


def _capacity(engine: Any) -> int:
    """Return how many adapters the workers keep for sure: none, with other API servers or where workers may restart."""
    config = engine.vllm_config
    if load().recover == "1" or config.parallel_config._api_process_count > 1:
        return 0
    return int(config.lora_config.max_cpu_loras)


async def _ask_workers(engine: Any, name: str, path: str) -> None:
    """Raise vLLM's VLLMNotFoundError, by which the server answers 404, where a node lacks an adapter's files."""
    from vllm.exceptions import VLLMNotFoundError

    try:
        await engine.collective_rpc(CHECK, args=(name, path))
    except Exception as error:  # vLLM raises a worker's error as an Exception with its text
        _, ours, text = str(error).partition(_ERROR)
        if not ours:
            raise
        raise VLLMNotFoundError(text.partition("', please check")[0]) from error
