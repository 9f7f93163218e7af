"""VLLM_RAY_ASCEND_RECOVER=1: what new workers are told again after a restart, and when a restart is not tried."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.lifecycle.deadlines import STEPS

MAKES_READY = frozenset(
    {
        "get_kv_cache_spec",
        "get_supported_kv_cache_layouts",
        "set_kv_cache_layout",
        "determine_available_memory",
        "update_max_model_len",
        "initialize_from_config",
        "compile_or_warm_up_model",
    }
)
"""What an engine asks of its workers before it serves: asked of new ones as well, in the same order."""
CHANGES_NOTHING = frozenset(STEPS) | {
    "connect_pairs",  # ours, of every start
    "take_draft_token_ids",
    "check_health",
    "get_supported_tasks",
    "supports_draft_weight_updates",
    "synchronize_device",
    "profile",
    "reset_mm_cache",
    "reset_encoder_cache",
    "list_loras",
    "add_lora",  # a request names its adapter's path, by which workers load it again
    "remove_lora",
    "pin_lora",
    "save_sharded_state",
}
"""What leaves workers as they were, or as the next request makes them."""

_MOST = 3
_WITHIN_S = 600.0


class Call(NamedTuple):
    """A collective_rpc, as it was called."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recovery:
    """What one executor needs to know for having its workers anew."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.changed_by = ""
        """The first call after which new workers would not be what the old ones were."""
        self.restarts: list[float] = []
        """When workers were restarted, as time.monotonic() has it."""

    def note(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call is made of all workers; our own, which every start makes, do not count."""
        if getattr(method, "__module__", "").startswith("vllm_ray_ascend."):
            return
        name = method if isinstance(method, str) else getattr(method, "__qualname__", "a function")
        if name in MAKES_READY:
            self.calls.append(Call(name, args, kwargs))
        elif name not in CHANGES_NOTHING and not self.changed_by:
            self.changed_by = name

    def obstacle(self) -> str:
        """Why the workers are not restarted; empty where they may be."""
        return obstacle(self.changed_by, self.restarts, time.monotonic())


def obstacle(changed_by: str, restarts: Sequence[float], now: float) -> str:
    """Why workers are not restarted, or an empty string. Times are in seconds."""
    if changed_by:
        return (
            f"collective_rpc({changed_by!r}) may have changed the workers, which new ones would not have (weights, "
            "sleep). Start the engine again, and have them changed again."
        )
    recent = [each for each in restarts if now - each < _WITHIN_S]
    if len(recent) >= _MOST:
        return (
            f"they were restarted {len(recent)} times within {_WITHIN_S:g} s, so the cause lasts: see the first error "
            "of each start above."
        )
    return ""


def refuse_unrecoverable(config: Any) -> None:
    """Raise SettingError where an engine of this vLLM config cannot go on with new workers."""
    if config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        why = "data parallel ranks of a MoE model step together, and one cannot restart alone"
    elif config.kv_transfer_config is not None:
        why = "a KV connector's peers know the old workers (--kv-transfer-config)"
    elif getattr(config.parallel_config, "enable_elastic_ep", False):
        why = "elastic expert parallelism replaces groups that a restart would have to know (--enable-elastic-ep)"
    else:
        return
    raise SettingError(f"VLLM_RAY_ASCEND_RECOVER=1 cannot be had here: {why}. Unset it, or leave that out.")
