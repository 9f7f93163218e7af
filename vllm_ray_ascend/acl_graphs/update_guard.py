"""An exception between a graph's replay and its update leaves no stream waiting.

A whole graph waits inside for events that vllm-ascend records after it has updated the attention's parameters. Where
the update fails, nobody records them: the next synchronisation, also that of an orderly shutdown, never returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_STREAM_TRIES = 4


def with_update_guard(update: Callable[..., None]) -> Callable[..., None]:
    """Return ``UpdatableGraph.update``, which lets the graph run to its end where it fails.

    The results of such a run must not be used; the exception is passed on.
    """

    @functools.wraps(update)
    def guarded_update(graph: Any, update_stream: Any, resolved_tasks: Any) -> None:
        try:
            update(graph, update_stream, resolved_tasks)
        except BaseException:  # whatever it is, replays wait for the events
            _record_events((task.event for task in graph.tasks), update_stream)
            raise

    return guarded_update


def with_parameter_update_guard(update: Callable[..., None]) -> Callable[..., None]:
    """Do as `with_update_guard` for attention whose parameters the model runner updates by itself, such as MLA's."""

    @functools.wraps(update)
    def guarded_update(runner: Any, forward_context: Any, num_tokens_padded: int) -> None:
        try:
            update(runner, forward_context, num_tokens_padded)
        except BaseException:  # whatever it is, replays wait for the events
            from vllm_ascend.compilation.acl_graph import get_graph_params

            parameters = get_graph_params()
            if parameters is not None:
                _record_events(parameters.events.get(num_tokens_padded, ()), runner.update_stream)
            raise

    return guarded_update


def _record_events(events: Iterable[Any], update_stream: Any) -> None:
    """Record the events for which a graph waits, from a stream that does not wait itself."""
    accelerator = current_accelerator()
    waiting = (update_stream, accelerator.current_stream())
    try:
        # torch_npu returns the streams of a pool in turn: a new one may be one of those that wait.
        candidates = (accelerator.create_stream() for _ in range(_STREAM_TRIES))
        free_stream = next(stream for stream in candidates if stream not in waiting)
        for event in events:
            event.record(free_stream)
    except (RuntimeError, StopIteration) as error:  # the error that is being raised matters more
        logger.warning(
            "VRA-405: the update of a graph failed, and its events could not be recorded: %r. The process may not end "
            "by itself; the error that follows is the cause.",
            error,
        )
