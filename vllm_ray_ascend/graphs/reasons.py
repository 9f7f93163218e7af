"""Why a graph could not be captured, in words and in the kinds that matter. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["streams", "memory", "other", "lost", "fault"]

_STREAMS = ("207008", "stream resources insufficient", "stream resources are insufficient", "alloc sq cq fail")
_MEMORY = ("207001", "out of memory")
_WORDS: dict[Kind, str] = {
    "streams": "the NPU has no stream left for another graph (207008)",
    "memory": "the NPU has no memory left for another graph",
    "other": "the capture failed",
    "lost": "the capture failed for good",
    "fault": "the model failed while it was captured",
}
_LONGEST = 300


class Reason(NamedTuple):
    """What went wrong. A ``fault`` is no want of anything: fewer graphs would not help, and it must not be hidden.

    ``lost``: it left the process unable to use its NPU any more.
    """

    kind: Kind
    text: str


def why(error: BaseException) -> Reason:
    """The reason behind ``error``; what ends a capture often hides what broke it, so all that led to it is read."""
    errors = list(_chain(error))
    first = errors[-1]
    return _reason(_kind(errors), f"{type(first).__name__}: {first}")


def short_of_streams(free: int, needed: int) -> Reason:
    """A graph that was not begun, since its streams are not there."""
    return Reason("streams", f"the NPU has {free} streams left, and such a graph takes {needed}")


def _reason(kind: Kind, said: str) -> Reason:
    line = " ".join(said.split())
    return Reason(kind, f"{_WORDS[kind]} [{line[:_LONGEST]}{'...' if len(line) > _LONGEST else ''}]")


def _kind(errors: list[BaseException]) -> Kind:
    """RuntimeError is what torch_npu raises for the device; anything else is a fault of the program."""
    said = " ".join(str(error) for error in errors).lower()
    if any(mark in said for mark in _STREAMS):
        return "streams"
    if any(mark in said for mark in _MEMORY):
        return "memory"
    return "other" if all(isinstance(error, RuntimeError) for error in errors) else "fault"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, then what caused it, back to the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
