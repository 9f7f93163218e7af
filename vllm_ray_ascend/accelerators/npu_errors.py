"""Meaning and remedy of an NPU's error, by its codes and texts. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable

from vllm_ray_ascend.accelerators.npu_codes import FEWER_GRAPHS, HCCL, NUMBERED, PLOG, RUNTIME, Meaning

_OLD_HDK = Meaning(
    "Alloc sq cq fail",
    "no queue is left for the capture of graphs, as with an HDK before 25.5.1",
    f"Install HDK 25.5.1 or later with its CANN. {FEWER_GRAPHS}.",
)
_NO_STREAMS = re.compile(
    r"stream resources? (?:are |is )?insufficient|insufficient[_ ]stream[_ ]resources", re.IGNORECASE
)
_OUT_OF_MEMORY = re.compile(r"\bNPU out of memory\b", re.IGNORECASE)
_NUMBERED_CODE = re.compile(r"\b(E[IJ]\d{4})\b")
_HCCL_CODE = re.compile(
    r"HCCL function error:[^\n]*?error code is (\d+)|hcclRet -> (\d+)|\bHCCL error:? (\d+)\b|\b(HCCL_E_[A-Z_]+)"
)
_RUNTIME_CODE = re.compile(r"(?:code(?: is)?|ErrCode|CANN error|ret)\s*[:=\[]?\s*(\d{6})\b", re.IGNORECASE)


def explain_text(text: str) -> str | None:
    """Return meaning and remedy of the most specific code or text in an error's message; None where none is known."""
    found = next((meaning for find in _FINDERS if (meaning := find(text)) is not None), None)
    return None if found is None else f"{found.name}: {found.what}. {found.remedy}"


def explain_hccl_code(code: int) -> str:
    """Return meaning and remedy of a result of an HCCL function."""
    found = HCCL.get(code, Meaning(f"HCCL error {code}", "no meaning of this code is known here", PLOG))
    return f"{found.name} ({code}): {found.what}. {found.remedy}"


def _find_known_text(text: str) -> Meaning | None:
    if "alloc sq cq fail" in text.lower():
        return _OLD_HDK
    if _NO_STREAMS.search(text):
        return RUNTIME[207008]
    return RUNTIME[207001]._replace(name="NPU out of memory") if _OUT_OF_MEMORY.search(text) else None


def _find_numbered_code(text: str) -> Meaning | None:
    return next((NUMBERED[number] for number in _NUMBERED_CODE.findall(text) if number in NUMBERED), None)


def _find_hccl_code(text: str) -> Meaning | None:
    for found in _HCCL_CODE.finditer(text):
        code = next((group for group in found.groups()[:3] if group), None)
        meaning = _find_hccl_name(found.group(4)) if code is None else HCCL.get(int(code))
        if meaning is not None:
            return meaning if code is None else meaning._replace(name=f"{meaning.name} ({code})")
    return None


def _find_hccl_name(name: str) -> Meaning | None:
    return next((meaning for meaning in HCCL.values() if meaning.name == name), None)


def _find_runtime_code(text: str) -> Meaning | None:
    codes = (int(code) for code in _RUNTIME_CODE.findall(text))
    return next((RUNTIME[c]._replace(name=f"{RUNTIME[c].name} ({c})") for c in codes if c in RUNTIME), None)


_FINDERS: tuple[Callable[[str], Meaning | None], ...] = (
    _find_known_text,
    _find_numbered_code,
    _find_hccl_code,
    _find_runtime_code,
)
"""The most specific first: an HCCL code means little where CANN adds a number of its own."""
