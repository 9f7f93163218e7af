"""What an error of the NPU means and what mends it, by its codes and texts. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable

from vllm_ray_ascend.accelerators.npu_codes import FEWER_GRAPHS, HCCL, NUMBERED, PLOG, RUNTIME, Meaning

_OLD_HDK = Meaning(
    "Alloc sq cq fail",
    "no queue is left for the capture of graphs, as with an HDK before 25.5.1",
    f"Install HDK 25.5.1 or later with its CANN. {FEWER_GRAPHS}.",
)
_STREAMS = re.compile(r"stream resources? (?:are |is )?insufficient|insufficient[_ ]stream[_ ]resources", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"\bNPU out of memory\b", re.IGNORECASE)
_NUMBERED = re.compile(r"\b(E[IJ]\d{4})\b")
_HCCL = re.compile(
    r"HCCL function error:[^\n]*?error code is (\d+)|hcclRet -> (\d+)|\bHCCL error:? (\d+)\b|\b(HCCL_E_[A-Z_]+)"
)
_RUNTIME = re.compile(r"(?:code(?: is)?|ErrCode|CANN error|ret)\s*[:=\[]?\s*(\d{6})\b", re.IGNORECASE)


def explain(text: str) -> str | None:
    """Meaning and remedy of the most telling code or text in an error's message; None where none is known."""
    found = next((meaning for look in _LOOKS if (meaning := look(text)) is not None), None)
    return None if found is None else f"{found.name}: {found.what}. {found.remedy}"


def hccl(code: int) -> str:
    """Meaning and remedy of a result of an HCCL function."""
    found = HCCL.get(code, Meaning(f"HCCL error {code}", "no meaning of this code is known here", PLOG))
    return f"{found.name} ({code}): {found.what}. {found.remedy}"


def _texts(text: str) -> Meaning | None:
    if "alloc sq cq fail" in text.lower():
        return _OLD_HDK
    if _STREAMS.search(text):
        return RUNTIME[207008]
    return RUNTIME[207001]._replace(name="NPU out of memory") if _OUT_OF_MEMORY.search(text) else None


def _numbered(text: str) -> Meaning | None:
    return next((NUMBERED[number] for number in _NUMBERED.findall(text) if number in NUMBERED), None)


def _of_hccl(text: str) -> Meaning | None:
    for found in _HCCL.finditer(text):
        code = next((group for group in found.groups()[:3] if group), None)
        meaning = _by_name(found.group(4)) if code is None else HCCL.get(int(code))
        if meaning is not None:
            return meaning if code is None else meaning._replace(name=f"{meaning.name} ({code})")
    return None


def _by_name(name: str) -> Meaning | None:
    return next((meaning for meaning in HCCL.values() if meaning.name == name), None)


def _of_runtime(text: str) -> Meaning | None:
    codes = (int(code) for code in _RUNTIME.findall(text))
    return next((RUNTIME[c]._replace(name=f"{RUNTIME[c].name} ({c})") for c in codes if c in RUNTIME), None)


_LOOKS: tuple[Callable[[str], Meaning | None], ...] = (_texts, _numbered, _of_hccl, _of_runtime)
"""The more telling ones first: an HCCL code says little where CANN adds a number of its own."""
