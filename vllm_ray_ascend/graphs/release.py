"""Graphs of a worker are destroyed, and captured anew."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from vllm_ray_ascend.graphs import device
from vllm_ray_ascend.graphs.runner import forget_keys, is_supported, state_of
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_ACL_GRAPH = "vllm_ascend.compilation.acl_graph"
_BREAKABLE = "vllm.compilation.breakable_cudagraph"
_PARAMETERS = ("_graph_params", "_draft_graph_params", "_draft_graph_prefill_params")


def release(worker: Any) -> None:
    """Destroy all graphs of ``worker``, which gives their streams and memory back. Until `recapture` it runs eagerly.

    For an orderly end, before groups are destroyed or changed, and before a sleep. May be called again, and where
    there are no graphs. Every rank of the engine has to do it before the next batch.
    """
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return
    if is_supported(runner):
        forget_keys(runner)
        state_of(runner).released = True
    release_graphs(runner)


def recapture(worker: Any) -> None:
    """Capture the graphs of ``worker`` anew after `release`, on all ranks at once; steps down as at the start.

    Groups, weights and KV cache have to be in place.
    """
    from vllm.config import set_current_vllm_config

    if not worker.model_config.enforce_eager:
        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.capture_model()


def release_graphs(runner: Any) -> None:
    """Destroy the graphs and what belongs to them; the plan stays.

    vllm-ascend drops its references only, so that a graph lives for as long as an error or an output holds on to it.
    """
    device.synchronize()
    acl_graph, breakable = sys.modules.get(_ACL_GRAPH), sys.modules.get(_BREAKABLE)
    if acl_graph is not None:
        for wrapper in list(acl_graph._acl_graph_wrappers):
            _reset(entry.aclgraph for entry in wrapper.concrete_aclgraph_entries.values())
            wrapper.concrete_aclgraph_entries.clear()
            wrapper.first_run_finished = False
        for name in _PARAMETERS:
            _empty(getattr(acl_graph, name, None))
    if breakable is not None:
        breakable.BreakableCUDAGraphWrapper.clear_all_graphs()
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None and hasattr(manager, "graphs"):
        _reset(manager.graphs.values())
        manager.graphs.clear()
        manager._graphs_captured = False
    encoder = getattr(runner, "encoder_cudagraph_manager", None)
    if encoder is not None and hasattr(encoder, "clear"):
        encoder.clear()
    _renew_pool(
        [
            *(acl_graph._acl_graph_wrappers if acl_graph else ()),
            *(breakable.BreakableCUDAGraphWrapper._all_instances if breakable else ()),
        ]
    )
    device.drop_unused_memory()


def _renew_pool(wrappers: list[Any]) -> None:
    """Another pool of memory for the graphs to come: one whose capture failed cannot be used again (`leave_pool`)."""
    from vllm.platforms import current_platform

    type(current_platform)._global_graph_pool = None
    for wrapper in wrappers:
        wrapper.graph_pool = current_platform.get_global_graph_pool()


def _reset(graphs: Any) -> None:
    for graph in graphs:
        if graph is not None:
            graph.reset()


def _empty(parameters: Any) -> None:
    """Parameters of attention for each size: events, handles and tensors of graphs that are gone."""
    if parameters is None:
        return
    for field in dataclasses.fields(parameters):
        held = getattr(parameters, field.name)
        for size, value in held.items():
            held[size] = [] if isinstance(value, list) else None
