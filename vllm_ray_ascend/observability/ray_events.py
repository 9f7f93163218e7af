"""Events in Ray's own list: `ray list cluster-events`, and the page "Cluster" of Ray's dashboard."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from pathlib import Path
from typing import Any

from vllm_ray_ascend.compat.ray_processes import session_log_folder
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import KINDS, Event, format_event

logger = get_logger(__name__)

_FILE = "event_COMMON.log"
"""Events of ours, in a folder of Ray's logs."""


def list_in_ray(event: Event) -> None:
    """Add an event to Ray's list; in Ray 2.48 to 2.60.

    Each node's agent reads them from a file in the folder of Ray's logs, and sends them to the dashboard. Where Ray
    runs without one the file is all that there is.
    """
    try:
        _add(event)
    except Exception as error:  # noqa: BLE001  whatever it is: an engine does not fail for a list
        _warn(f"{type(error).__name__}: {error}")


def _add(event: Event) -> None:
    folder = session_log_folder()
    if folder is None:
        return
    events = _ray_events(folder)
    level = KINDS[event.event].level
    add = events.info if level == logging.INFO else events.warning if level == logging.WARNING else events.error
    fields = {name: str(value) for name, value in event.fields.items() if value is not None}
    add(format_event(event, "text").removeprefix("event "), **fields, engine=event.engine)


class _EventFormatter(logging.Formatter):
    """Writes an event with its time as Ray's own events on this node have it.

    Ray 2.48 to 2.60 cannot list texts beside numbers, and its writer for Python writes texts alone.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("%(message)s")
        self._folder = folder

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if times_are_text(self._folder):
            return line
        event = json.loads(line)
        return json.dumps({**event, "timestamp": int(event["timestamp"])})


def times_are_text(folder: Path) -> bool:
    """Return whether an event that Ray has written to the ``folder`` has its time as text, as those of jobs have.

    Where there are none it is no text: raylets write numbers, once a worker has died.
    """
    for path in folder.glob("event_*.log"):
        with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as lines:
            if path.name != _FILE and isinstance(json.loads(next(lines, "{}")).get("timestamp"), str):
                return True
    return False


@functools.cache
def _ray_events(folder: Path) -> Any:
    """Return Ray's writer of events of a session. Ray's own function for that remembers the first session for ever."""
    from ray._private.event.event_logger import Event as RayEvent
    from ray._private.event.event_logger import EventLoggerAdapter

    path = folder / "events" / _FILE
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(_EventFormatter(path.parent))
    file = logging.getLogger(f"vllm_ray_ascend_events{folder}")
    file.setLevel(logging.INFO)
    file.propagate = False  # these lines are in no other log
    file.addHandler(handler)
    return EventLoggerAdapter(RayEvent.SourceType.COMMON, file)


@functools.cache
def _warn(error: str) -> None:
    """Log once that events are missing in Ray's list."""
    logger.warning("VRA-365: events are not in the list of Ray (`ray list cluster-events`): %s", error)
