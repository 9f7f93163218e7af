"""Which engines can be scaled. Pure but for what it asks of the installed packages; imports nothing heavy."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from vllm_ray_ascend.errors import ElasticEPError, ElasticSizeError
from vllm_ray_ascend.observability.metrics import DP_RANK_UP
from vllm_ray_ascend.settings import load, variable_of

WORKER = "vllm_ray_ascend.elastic_ep.worker.ElasticNPUWorker"
HCCL, GLOO = "torch_nccl", "torch_gloo"
"""Values of --eplb-config.communicator: vLLM's names for the device's process group and for host memory."""
_AUTO_SELECTED = "_vllm_ascend_eplb_auto_selected"
"""Set by vllm-ascend on an EPLBConfig whose communicator the user has not chosen."""
_SCALING = "vllm.distributed.elastic_ep.elastic_execute"
_BALANCING = "vllm_ascend.distributed.eplb.eplb_state"

MIN_RANKS = 2
"""vLLM has one rank step by itself, without the groups that scaling replaces."""

COMMAND = (
    "VLLM_RAY_ASCEND_ELASTIC_EP=1 vllm serve MODEL --data-parallel-size 2 --data-parallel-backend ray "
    "--distributed-executor-backend ray --enable-expert-parallel --enable-eplb --enable-elastic-ep "
    "--elastic-ep-max-dp-size 4 --eplb-config.use_async false --eplb-config.policy default --api-server-count 1"
)


def is_elastic(vllm_config: Any) -> bool:
    """Return whether an engine has elastic expert parallelism, which needs our switch."""
    return bool(getattr(vllm_config.parallel_config, "enable_elastic_ep", False))


def check(vllm_config: Any) -> None:
    """Raise ElasticEPError where an elastic engine cannot work; else choose how its experts move.

    It stands for vllm-ascend's own check of expert load balancing, which refuses all elastic engines.
    """
    if load().elastic_ep != "1":
        raise ElasticEPError(
            "VRA-150",
            f"--enable-elastic-ep on NPUs is experimental and switched off. {variable_of('elastic_ep')}=1 switches it "
            f"on: {COMMAND}",
        )
    if lacking := missing_feature():
        raise ElasticEPError(
            "VRA-151",
            f"--enable-elastic-ep needs vLLM 0.30 and vllm-ascend 0.30.0rc2: {lacking}. Install them, or leave the "
            "option out and restart with another --data-parallel-size.",
        )
    if reason := obstacle(vllm_config):
        raise ElasticEPError("VRA-152", f"--enable-elastic-ep on NPUs does not work with {reason}. Use: {COMMAND}")
    balancing = vllm_config.parallel_config.eplb_config
    if balancing.__dict__.pop(_AUTO_SELECTED, False):
        balancing.communicator = HCCL


def check_ranks_up(down: str) -> None:
    """Raise ElasticEPError where ranks are ``down``: an engine is not scaled meanwhile."""
    if down:
        raise ElasticEPError(
            "VRA-167",
            f"the engine is not scaled now: {down}. Request it again once all ranks serve: the metric "
            f"{DP_RANK_UP.name}.",
        )


def check_size(ranks: int, given_groups: int = 0) -> None:
    """Raise ElasticSizeError where an engine cannot have so many data parallel ranks.

    ``given_groups`` are the placement groups that its caller has made, each for a rank.
    """
    if ranks < MIN_RANKS:
        raise ElasticSizeError(
            "VRA-168", f"an elastic engine has {MIN_RANKS} data parallel ranks at least, not {ranks}"
        )
    if ranks < given_groups:
        raise ElasticSizeError(
            "VRA-170",
            f"an engine cannot leave placement groups that it has not made: it was given those of {given_groups} data "
            f"parallel ranks, and is to have {ranks}. Start it without placement groups to scale it below that.",
        )


def weights_obstacle(changed_by: str, present: int, size: int) -> str:
    """Return why an engine whose weights a call has changed is not scaled from ``present`` to ``size`` ranks.

    Empty where it can be: nothing has changed them, or no rank joins, which would load the model from its file.
    """
    if not changed_by or size <= present:
        return ""
    return f"the weights were changed ({changed_by}), and ranks that join load the model from its file"


def obstacle(vllm_config: Any) -> str:
    """Return what in a configuration does not go with elastic expert parallelism; empty where nothing is known."""
    parallel, balancing = vllm_config.parallel_config, vllm_config.parallel_config.eplb_config
    chosen = None if balancing.__dict__.get(_AUTO_SELECTED) else balancing.communicator
    found = {
        "a data parallel backend other than ray": parallel.data_parallel_backend != "ray",
        f"{variable_of('executor')}={load().executor}": load().executor != "ours",
        f"--data-parallel-size {parallel.data_parallel_size}": parallel.data_parallel_size < MIN_RANKS,
        f"--worker-cls {parallel.worker_cls}": parallel.worker_cls != "auto",
        "vllm-ascend's second model runner (VLLM_USE_V2_MODEL_RUNNER=1)": vllm_config.use_v2_model_runner,
        "asynchronous load balancing (--eplb-config.use_async true)": balancing.use_async,
        f"--eplb-config.policy {balancing.policy}": balancing.policy != "default",
        f"--eplb-config.communicator {chosen}": chosen not in (None, HCCL, GLOO),
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "a quantised model": vllm_config.quant_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-lora": vllm_config.lora_config is not None,
        "--enable-sleep-mode": vllm_config.model_config.enable_sleep_mode,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        **{f"additional_config {name}": True for name in _group_options(vllm_config.additional_config or {})},
    }
    return next((what for what, is_so in found.items() if is_so), "")


def _group_options(options: dict[str, Any]) -> list[str]:
    """Return vllm-ascend's options that create groups over all engines, or balance experts by themselves."""
    names = ("finegrained_tp_config", "kvpp_config", "eplb_config", "xlite_graph_config")
    return [name for name in names if options.get(name)]


def missing_feature() -> str:
    """Return what the installed vLLM and vllm-ascend lack; empty where they have all that is built on here."""
    try:
        scaling, balancing = import_module(_SCALING), import_module(_BALANCING)
    except ImportError as error:
        return f"there is no {error.name}"
    needed = ("start_async", "switch_and_prepare", "_warm_target_groups", "_start_group_cleanup")
    for name in needed:
        if not hasattr(scaling.ElasticEPScalingExecutor, name):
            return f"{_SCALING}.ElasticEPScalingExecutor has no {name}"
    parent = balancing.AscendEplbState.__mro__[1]
    if not _takes_all(balancing.AscendEplbState.rearrange, parent.rearrange):
        return f"{_BALANCING}.AscendEplbState.rearrange does not take what vLLM's does"
    return ""


def _takes_all(ours: Any, theirs: Any) -> bool:
    return set(inspect.signature(theirs).parameters) <= set(inspect.signature(ours).parameters)
