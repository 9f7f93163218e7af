"""ASCEND_RT_VISIBLE_DEVICES: which NPUs a process sees, and what CANN makes of a wrong list."""

from __future__ import annotations

VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def entries(visible: str | None) -> list[str] | None:
    """The list's entries, or None where it is unset or empty, which lets a process see every NPU of its node."""
    if not visible or not visible.strip():
        return None
    return [entry.strip() for entry in visible.split(",")]


def physical(visible: str | None, index: int) -> int:
    """Physical number of the NPU with visible index ``index``. Raises IndexError or ValueError where there is none."""
    listed = entries(visible)
    return index if listed is None else int(listed[index])


def complaint(visible: str | None, seen: int) -> str | None:
    """What is wrong with the list of a process that sees ``seen`` NPUs, or None.

    CANN drops the first entry that it does not know, and all after it, without a word: such a process sees fewer NPUs
    than its list names.
    """
    listed = entries(visible)
    if listed is None or seen >= len(listed):
        return None
    if len(set(listed)) < len(listed):
        return f"{VARIABLE}={visible} names an NPU twice"
    return (
        f"{VARIABLE}={visible} names NPU {listed[seen]!r}, which is not there: {seen} of its {len(listed)} are usable"
    )
