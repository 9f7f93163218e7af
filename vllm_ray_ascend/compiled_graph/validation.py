"""Features that the compiled-graph executor does not support, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.settings import Settings


def validate(config: Any, settings: Settings) -> None:
    """Raise SettingError where an engine of this vLLM config cannot run as a compiled graph."""
    reasons = list(unsupported_features(config, settings))
    if reasons:
        raise SettingError(
            "VRA-466",
            "VLLM_RAY_ASCEND_EXECUTOR=compiled_graph cannot run this engine: "
            + "; ".join(reasons)
            + ". Leave that out, or unset VLLM_RAY_ASCEND_EXECUTOR: the default executor supports all of it.",
        )


def unsupported_features(config: Any, settings: Settings) -> Iterator[str]:
    """Yield the reasons, each with the setting that requests the feature."""
    parallel = config.parallel_config
    has_stages = parallel.pipeline_parallel_size > 1
    if settings.recover == "1":
        yield "the channels of a graph end with its workers (VLLM_RAY_ASCEND_RECOVER=1)"
    if config.scheduler_config.async_scheduling:
        yield "a graph returns its responses when they are complete (--async-scheduling)"
    if parallel.data_parallel_size > 1 and getattr(config.model_config, "is_moe", False):
        yield "data parallel ranks of a MoE model run dummy batches outside of the graph (--data-parallel-size)"
    if getattr(config, "kv_transfer_config", None) is not None:
        yield "a KV connector needs the responses of all ranks (--kv-transfer-config)"
    if getattr(config, "ec_transfer_config", None) is not None:
        yield "an encoder cache connector needs the responses of all ranks (--ec-transfer-config)"
    if getattr(parallel, "enable_elastic_ep", False):
        yield "elastic expert parallelism replaces groups that the graph uses (--enable-elastic-ep)"
    if has_stages and getattr(config, "use_v2_model_runner", False):
        yield "vLLM's second model runner sends tokens between stages outside the graph (VLLM_USE_V2_MODEL_RUNNER=1)"
