"""Cause of a failed capture: a kind that decides what to do, and a text. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

FailureKind = Literal["streams", "memory", "other", "device_unusable", "program_error"]
"""``program_error`` is no lack of a resource: fewer graphs would not help, and they must not hide it.
``device_unusable``: the failure left the process unable to use its NPU."""

_STREAM_TEXTS = ("207008", "stream resources insufficient", "stream resources are insufficient", "alloc sq cq fail")
_MEMORY_TEXTS = ("207001", "out of memory")
_DESCRIPTIONS: dict[FailureKind, str] = {
    "streams": "the NPU has no stream left for another graph (207008)",
    "memory": "the NPU has no memory left for another graph",
    "other": "the capture failed",
    "device_unusable": "the capture failed and left the NPU unusable",
    "program_error": "the model failed while it was captured",
}
_MAX_TEXT_LENGTH = 300


class FailureCause(NamedTuple):
    """Why a graph could not be captured."""

    kind: FailureKind
    text: str


def classify(error: BaseException) -> FailureCause:
    """Return the cause behind ``error``, read from its whole chain: the last error often hides the first one."""
    errors = list(_exception_chain(error))
    first, kind = errors[-1], _failure_kind(errors)
    line = " ".join(f"{type(first).__name__}: {first}".split())
    shortened = f"{line[:_MAX_TEXT_LENGTH]}..." if len(line) > _MAX_TEXT_LENGTH else line
    return FailureCause(kind, f"{_DESCRIPTIONS[kind]} [{shortened}]")


def stream_shortage(free: int, needed: int) -> FailureCause:
    """Return the cause for a graph whose capture was not begun, since its streams are not available."""
    return FailureCause("streams", f"the NPU has {free} streams left, and such a graph takes {needed}")


def _failure_kind(errors: list[BaseException]) -> FailureKind:
    """Return the kind: torch_npu raises RuntimeError for the device, so anything else is an error of the program."""
    texts = " ".join(str(error) for error in errors).lower()
    if any(part in texts for part in _STREAM_TEXTS):
        return "streams"
    if any(part in texts for part in _MEMORY_TEXTS):
        return "memory"
    return "other" if all(isinstance(error, RuntimeError) for error in errors) else "program_error"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error``, then what caused it, back to the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
