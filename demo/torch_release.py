"""What vLLM's compiled mode needs where torch is newer than the one that vllm-ascend asks for."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

NEWEST_WITH_AOT = Version("2.10")
"""vllm-ascend 0.30's. By 2.13, torch compiles ahead of time in a way that vllm-ascend's compiler does not know: an
engine ends with "expected OutputCode, got ..."."""


def compile_variables() -> dict[str, str]:
    """Return environment variables for the installed torch."""
    release = Version(version("torch")).release
    return {"VLLM_USE_AOT_COMPILE": "0"} if release[:2] > NEWEST_WITH_AOT.release else {}
