"""What happens to an engine, as structured events: failures, restarts, graph fallbacks. Each is one line of the log.

Codes whose events arise in a worker have it sent to the executor, which emits it there (executor/worker.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import msgspec

from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

Value = str | int | float | None
Format = Literal["text", "json"]


class Kind(NamedTuple):
    """One kind of event."""

    name: str
    help: str
    fields: tuple[str, ...]
    level: int = logging.WARNING


ENGINE_READY = Kind("engine_ready", "all workers have started", ("ranks", "nodes", "seconds"), logging.INFO)
ENGINE_FAILED = Kind(
    "engine_failed",
    "a worker died, failed or hangs: the first cause",
    ("code", "cause", "rank", "location", "detection_seconds"),
    logging.ERROR,
)
WORKERS_RESTARTING = Kind("workers_restarting", "all workers are being replaced", ("restart",))
WORKERS_RESTARTED = Kind("workers_restarted", "the new workers are ready", ("restart", "seconds"))
REQUESTS_ABORTED = Kind("requests_aborted", "running requests ended with an error", ("aborted", "waiting"))
GRAPHS_CAPTURED = Kind("graphs_captured", "ACL graphs were captured", ("rank", "graphs", "mode"), logging.INFO)
GRAPH_FALLBACK = Kind("graph_fallback", "a capture failed, fewer graphs follow", ("rank", "reason", "mode", "graphs"))
HEAD_LOST = Kind("ray_head_lost", "Ray's head does not answer", ("address",), logging.ERROR)
HEAD_BACK = Kind("ray_head_back", "Ray's head answers again", ("address",))
WORKERS_CHANGED = Kind(
    "workers_changed", "a call may have changed the workers, so that none is restarted", ("call",), logging.INFO
)
RANKS_LOST = Kind("ranks_lost", "data parallel ranks serve no requests and are restarted", ("ranks", "cause"))
RANKS_RESTORED = Kind("ranks_restored", "data parallel ranks serve again", ("ranks", "seconds"), logging.INFO)
RANKS_ADDED = Kind("ranks_added", "elastic scaling adds data parallel ranks", ("data_parallel_size",), logging.INFO)
RANKS_REMOVED = Kind("ranks_removed", "lost NPUs leave the engine with fewer ranks", ("data_parallel_size",))

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in list(globals().values()) if isinstance(kind, Kind)}


class Event(msgspec.Struct, frozen=True):
    """One event. ``time`` in seconds since 1970; ``engine``: model and data parallel rank, empty where unknown."""

    event: str
    time: float
    engine: str
    fields: dict[str, Value]


Listener = Callable[[Event], None]


class Events:
    """The events of one process. May be used in any thread."""

    def __init__(self) -> None:
        self.engine = ""
        """The engine that this process runs: `engine_name`."""
        self.format: Format = "text"
        self.forward: Listener | None = None
        """In a worker: sends the events to its executor, which logs them."""
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with each event from now on, in the thread in which it arises. A second time is as one."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def emit(self, kind: Kind, **fields: Value) -> None:
        """Log an event of ``kind``, and pass it to all listeners."""
        event = Event(kind.name, round(time.time(), 3), self.engine, fields)
        if self.forward is not None:
            self.forward(event)
            return
        logger.log(kind.level, "%s", format_event(event, self.format))
        for listener in list(self._listeners):
            listener(event)


EVENTS = Events()
"""Those of this process."""


def engine_name(model: str, dp_rank: int) -> str:
    """Return the name of an engine for people: its model, and its data parallel rank."""
    return f"{model.rstrip('/').rpartition('/')[2]}/dp{dp_rank}"


def format_event(event: Event, style: Format) -> str:
    """Return the event's line: one JSON object, or pairs ``name=value`` with values in quotes where they need them."""
    if style == "json":
        return "event " + msgspec.json.encode(event).decode()
    pairs = {"engine": event.engine, **event.fields}
    return f"event {event.event} " + " ".join(f"{name}={_quote(value)}" for name, value in pairs.items())


def _quote(value: Value) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text if text and not set(text) & set(' "=\n') else msgspec.json.encode(text).decode()
