"""Calls of all workers by what they change: which ones new workers, or a new engine core, need or would lack."""

from __future__ import annotations

from vllm_ray_ascend.control.timeouts import STEPS

READINESS_CALLS = frozenset(
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
"""Calls of an engine before it serves: repeated for new workers, in the same order."""
STATELESS_CALLS = frozenset(STEPS) | {
    "connect_pipeline_pairs",  # ours, of every start
    "elastic_ep_execute",  # a new engine core is started with the new number of ranks
    "check_health",
    "get_supported_tasks",
    "supports_draft_weight_updates",
    "synchronize_device",
    "profile",
    "reset_mm_cache",
    "reset_encoder_cache",
    "list_loras",
    "add_lora",  # a request names its adapter's path, by which workers load it again
    "check_adapter",  # ours, before such a request
    "remove_lora",
    "pin_lora",
    "save_sharded_state",
}
"""Calls that leave workers as they were, or in a state that the next request sets again."""

IDEMPOTENT_UTILITIES = STATELESS_CALLS | {
    "reset_prefix_cache",
    "get_supported_tasks",
    "is_sleeping",
    "is_scheduler_paused",
    "execute_dummy_batch",
}
"""Calls of all engine cores that one which is down need not take part in: a new one is as if it had."""

WEIGHT_CALLS = frozenset(
    {
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
        "reload_weights",
    }
)
"""Calls of all workers that change weights: a worker that loads the model later lacks that."""
