"""ASCEND_RT_VISIBLE_DEVICES: which NPUs a process sees, and what CANN makes of a wrong list.

A list that is set but blank names no NPU for CANN, and is as good as unset for vLLM. Ray writes such a list into actors
without NPUs (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1). `parse` and `rejected` read it as CANN does, `entries` and
`complaint` as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile

VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def entries(visible: str | None) -> list[str] | None:
    """The list's entries, or None where it is unset or empty, which lets a process see every NPU of its node."""
    if not visible or not visible.strip():
        return None
    return [entry.strip() for entry in visible.split(",")]


def parse(visible: str | None, count: int) -> list[int]:
    """Physical numbers of the NPUs that CANN makes usable of a list, in its order, on a node with ``count`` NPUs.

    An unset list means all of them, a blank one none. CANN stops at the first entry that is no number of an NPU of the
    node, or that came before, and drops it and all after it without a word. Newer CANN is stricter: see `caution`.
    """
    return list(range(count)) if visible is None else _read(visible, count)[0]


def rejected(visible: str | None, count: int) -> str | None:
    """What is wrong with the entry at which CANN stops, such as "names NPU 4 twice"; None where all are usable."""
    return None if visible is None else _read(visible, count)[1]


def caution(visible: str | None, count: int) -> str | None:
    """What CANN since 8.0 refuses of a list that CANN before, and the software NPU, take; None where nothing.

    Upstream: Runtime::GetVisibleDevices in CANN's runtime, and CANN's page on the variable.
    """
    if visible is None:
        return None
    if any(character.isspace() for character in visible):
        return "has a space: CANN since 8.0 stops reading there"
    named = [int(entry) for entry in takewhile(lambda entry: not _wrong(entry, count, ()), visible.split(","))]
    if any(left >= right for left, right in pairwise(named)):
        return "does not name its NPUs in ascending order, each once: CANN since 8.0 then lets the process see no NPU"
    return None


def listed(physical: Sequence[int]) -> str:
    """The list that names these NPUs, in this order."""
    return ",".join(map(str, physical))


def complaint(visible: str | None, seen: int) -> str | None:
    """What is wrong with the list of a process that sees ``seen`` NPUs, or None.

    CANN drops the first entry that it does not know, and all after it, without a word: such a process sees fewer NPUs
    than its list names.
    """
    found = entries(visible)
    if found is None or seen >= len(found):
        return None
    if len(set(found)) < len(found):
        return f"{VARIABLE}={visible} names an NPU twice"
    return f"{VARIABLE}={visible} names NPU {found[seen]!r}, which is not there: {seen} of its {len(found)} are usable"


def _read(visible: str, count: int) -> tuple[list[int], str | None]:
    """The usable NPUs of a list that is set, and what is wrong with the entry that ends them."""
    usable: list[int] = []
    for entry in entries(visible) or [""]:
        wrong = _wrong(entry, count, usable)
        if wrong:
            return usable, wrong
        usable.append(int(entry))
    return usable, None


def _wrong(entry: str, count: int, earlier: Sequence[int]) -> str | None:
    if not entry:
        return "has a blank where an NPU should be" if earlier else "names no NPU"
    if not (entry.isascii() and entry.removeprefix("-").isdigit()):
        return f"names {entry!r}, which is no number"
    if not 0 <= int(entry) < count:
        return f"names NPU {entry!r}, which is not there"
    return f"names NPU {int(entry)} twice" if int(entry) in earlier else None
