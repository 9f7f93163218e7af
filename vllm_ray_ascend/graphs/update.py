"""An exception between a replay and its update leaves no stream waiting.

A whole graph waits inside for events that vllm-ascend records after it has updated the attention's parameters. Where
the update fails, nobody records them: the next synchronisation, be it that of an orderly end, never returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_TRIES = 4


def with_rescue(update: Callable[..., None]) -> Callable[..., None]:
    """``UpdatableGraph.update``, which lets the graph go on where it fails. What it computes then, nobody may use."""

    @functools.wraps(update)
    def rescuing(graph: Any, update_stream: Any, resolved_tasks: Any) -> None:
        try:
            update(graph, update_stream, resolved_tasks)
        except BaseException:
            _let_go((task.event for task in graph.tasks), update_stream)
            raise

    return rescuing


def with_rescue_of_parameters(update: Callable[..., None]) -> Callable[..., None]:
    """The same for attention whose parameters the model runner updates by itself, such as MLA's."""

    @functools.wraps(update)
    def rescuing(runner: Any, forward_context: Any, num_tokens_padded: int) -> None:
        try:
            update(runner, forward_context, num_tokens_padded)
        except BaseException:
            from vllm_ascend.compilation.acl_graph import get_graph_params

            parameters = get_graph_params()
            if parameters is not None:
                _let_go(parameters.events.get(num_tokens_padded, ()), runner.update_stream)
            raise

    return rescuing


def _let_go(events: Iterable[Any], update_stream: Any) -> None:
    npu = current()
    waiting = (update_stream, npu.current_stream())
    try:
        # torch_npu gives out the streams of a pool in turn: a new one may be one of those that wait.
        rescue = next(stream for _ in range(_TRIES) if (stream := npu.new_stream()) not in waiting)
        for event in events:
            event.record(rescue)
    except (RuntimeError, StopIteration) as error:  # the error that is under way matters more
        logger.warning("a graph whose update failed could not be let go: %r", error)
