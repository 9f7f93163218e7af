"""ASCEND_RT_VISIBLE_DEVICES: which NPUs a process sees, and how CANN reads a wrong list.

A list that is set but blank selects no NPU for CANN, and counts as unset for vLLM. Ray writes such a list into actors
without NPUs (RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1). `usable_physical_ids` and `invalid_entry` read it as CANN does,
`split_entries` and `visibility_error` as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"


def split_entries(visible_devices: str | None) -> list[str] | None:
    """Return the list's entries, or None where it is unset or blank, which lets a process see every NPU of its node."""
    if not visible_devices or not visible_devices.strip():
        return None
    return [entry.strip() for entry in visible_devices.split(",")]


def usable_physical_ids(visible_devices: str | None, npu_count: int) -> list[int]:
    """Return the physical ids that CANN makes usable of a list, in its order, on a node with ``npu_count`` NPUs.

    An unset list means all of them, a blank one none. CANN stops at the first entry that is not the id of an NPU of the
    node, or is a duplicate, and silently drops it and all after it. Newer CANN is stricter: see `warning_for`.
    """
    return list(range(npu_count)) if visible_devices is None else _read_as_cann(visible_devices, npu_count)[0]


def invalid_entry(visible_devices: str | None, npu_count: int) -> str | None:
    """Return what is wrong with the entry at which CANN stops, such as "names NPU 4 twice"; None: all are usable."""
    return None if visible_devices is None else _read_as_cann(visible_devices, npu_count)[1]


def warning_for(visible_devices: str | None, npu_count: int) -> str | None:
    """Return what CANN 8.0 and later reject of a list that older CANN and the software NPU accept; None: nothing.

    Upstream: Runtime::GetVisibleDevices in CANN's runtime, and CANN's page on the variable.
    """
    if visible_devices is None:
        return None
    if any(character.isspace() for character in visible_devices):
        return "has a space: CANN since 8.0 stops reading there"
    valid = takewhile(lambda entry: not _entry_error(entry, npu_count, ()), visible_devices.split(","))
    if any(left >= right for left, right in pairwise(map(int, valid))):
        return "does not name its NPUs in ascending order, each once: CANN since 8.0 then lets the process see no NPU"
    return None


def format_ids(physical_ids: Sequence[int]) -> str:
    """Return the list that names these NPUs, in this order."""
    return ",".join(map(str, physical_ids))


def visibility_error(visible_devices: str | None, visible_count: int) -> str | None:
    """Return what is wrong with the list of a process that sees ``visible_count`` NPUs, or None.

    CANN silently drops the first entry that it does not know and all after it: such a process sees fewer NPUs than its
    list names.
    """
    entries = split_entries(visible_devices)
    if entries is None or visible_count >= len(entries):
        return None
    if len(set(entries)) < len(entries):
        return f"{VISIBLE_DEVICES}={visible_devices} names an NPU twice"
    return (
        f"{VISIBLE_DEVICES}={visible_devices} names NPU {entries[visible_count]!r}, which does not exist: "
        f"{visible_count} of its {len(entries)} are usable"
    )


def _read_as_cann(visible_devices: str, npu_count: int) -> tuple[list[int], str | None]:
    """Return the usable physical ids of a list that is set, and what is wrong with the entry at which CANN stops."""
    usable_ids: list[int] = []
    for entry in split_entries(visible_devices) or [""]:
        error = _entry_error(entry, npu_count, usable_ids)
        if error:
            return usable_ids, error
        usable_ids.append(int(entry))
    return usable_ids, None


def _entry_error(entry: str, npu_count: int, earlier_ids: Sequence[int]) -> str | None:
    if not entry:
        return "has an empty entry" if earlier_ids else "names no NPU"
    if not (entry.isascii() and entry.removeprefix("-").isdigit()):
        return f"names {entry!r}, which is not a number"
    if not 0 <= int(entry) < npu_count:
        return f"names NPU {entry!r}, which does not exist"
    return f"names NPU {int(entry)} twice" if int(entry) in earlier_ids else None
