"""What a check of nodes has found: plain data, the same for the audit before an engine's start and for `doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

Severity = Literal["error", "warning", "info", "unknown"]
"""An error makes an engine fail, a warning may. ``unknown``: the source of a check is missing, which is never ok."""
WORST_FIRST: tuple[Severity, ...] = ("error", "warning", "unknown", "info")


class Finding(msgspec.Struct, frozen=True):
    """Something wrong with a node, or with one of its NPUs."""

    address: str
    """Ray's address of the node; empty for what is wrong with the cluster as a whole."""
    severity: Severity
    code: str
    """Of docs/errors.md, such as "VRA-201"."""
    text: str
    remedy: str = ""
    """What to do, mostly a command."""
    physical_id: int | None = None
    """The NPU, where it is one."""
    check: str = ""
    """Name of the check, as `vllm-ray-ascend doctor --checks` takes it."""
    values: dict[str, Any] = {}
    """What was compared, for programs."""

    def __str__(self) -> str:
        npu = "" if self.physical_id is None else f", NPU {self.physical_id}"
        place = f"node {self.address}{npu}: " if self.address else ""
        return f"{self.code}: {place}{' '.join(filter(None, [self.text, self.remedy]))}"


def format_count(number: float, thing: str) -> str:
    """Return a number of things in words: "2 NPUs"."""
    return f"{number:g} {thing}{'' if number == 1 else 's'}"


def join(values: Iterable[object]) -> str:
    """Return values as a list in a text."""
    return ", ".join(map(str, values))
