"""The command line of an engine: what cannot work is refused, and what it leaves open decided, where vLLM reads it."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.addresses import without_brackets
from vllm_ray_ascend.engine import data_parallel
from vllm_ray_ascend.errors import SettingError

_CREATE_CONFIG = "vllm.engine.arg_utils.EngineArgs.create_engine_config"
_GET_MODEL_PATH = "vllm.engine.arg_utils.get_model_path"


def complete_configs(is_our_platform: Callable[[], bool]) -> None:
    """Have each engine's config checked and completed where vLLM makes it, if the platform is ours then."""
    patches.wrap(_CREATE_CONFIG, functools.partial(_with_completion, is_our_platform))
    patches.wrap(_GET_MODEL_PATH, functools.partial(_with_path_check, is_our_platform))


def check_model_path(model: str) -> None:
    """Raise SettingError where ``model`` is a path that this node does not have: vLLM takes it for a name on a hub."""
    if not _is_missing(model):
        return
    parent = next(each for each in Path(model).parents if os.path.exists(each))
    raise SettingError(
        "VRA-171",
        f"there is no folder or file {model} on node {socket.gethostname()}, where {parent} is the last folder of that "
        "path that this process can see. A model has to be under the same path on every node, and in containers "
        f"mounted there: `ls {model}` on each, or `vllm-ray-ascend doctor --model {model}` for all.",
    )


def _is_missing(model: str) -> bool:
    return os.path.isabs(model) and not os.path.exists(model)  # Path.exists raises where a folder may not be read


def _with_path_check(is_our_platform: Callable[[], bool], get_model_path: Callable[..., Any]) -> Callable[..., Any]:
    """Return `get_model_path`, which takes names, and which vLLM calls before all else with HF_HUB_OFFLINE."""

    @functools.wraps(get_model_path)
    def get_existing_path(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_missing(model) and is_our_platform():
            check_model_path(model)
        return get_model_path(model, *args, **kwargs)

    return get_existing_path


def _is_read_from_its_path(args: Any) -> bool:
    """Return whether an engine over Ray reads its config from the model's path, and from nowhere else."""
    over_ray = "ray" in (args.distributed_executor_backend, args.data_parallel_backend)
    return over_ray and not args.hf_config_path and not os.environ.get("VLLM_MODEL_REDIRECT_PATH")


def _with_completion(is_our_platform: Callable[[], bool], create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_missing(self.model) and _is_read_from_its_path(self) and is_our_platform():
            check_model_path(self.model)
        sets_address, sets_local = self.data_parallel_address is not None, self.data_parallel_size_local is not None
        vllm_config = create(self, *args, **kwargs)
        config = vllm_config.parallel_config
        config.data_parallel_master_ip = without_brackets(config.data_parallel_master_ip)  # vLLM binds sockets to it
        if config.data_parallel_backend == "ray" and is_our_platform() and not _is_one_of_several_servers(self):
            is_default = not sets_local and config.data_parallel_size_local == config.data_parallel_size
            sets_address = sets_address or bool(os.environ.get("VLLM_HOST_IP"))
            data_parallel.complete(config, sets_address, is_default, vllm_config.model_config.is_moe)
        return vllm_config

    return create_engine_config


def _is_one_of_several_servers(args: Any) -> bool:
    """Return whether this process is an API server beside others: their parent starts the engine."""
    return bool(args._api_process_count > 1 and args._api_process_rank >= 0)
