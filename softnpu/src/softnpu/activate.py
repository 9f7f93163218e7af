"""The environment with which a process, and all that it starts, runs on software NPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from softnpu.build import PRELOADED, build_libraries
from softnpu.errors import SoftNpuError

SITE = Path(__file__).parent / "site"
REAL_DRIVER = (Path("/dev/davinci_manager"), Path("/usr/local/Ascend/driver"))


def reject_real_driver() -> None:
    """Raise SoftNpuError where a real Ascend driver is present: software and real NPUs are never mixed."""
    for path in REAL_DRIVER:
        if path.exists():
            raise SoftNpuError(
                f"This machine has a real Ascend driver ({path} exists), so the software NPU refuses to load. "
                "Run the command without `softnpu exec`."
            )


def prepend_path(entry: str, paths: str | None) -> str:
    """Return ``paths`` (colon separated) with ``entry`` once, at the front."""
    return os.pathsep.join([entry, *(path for path in (paths or "").split(os.pathsep) if path and path != entry)])


def make_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return ``base`` with what the software NPU needs; builds it first. What the user set is kept.

    Raises SoftNpuError without a compiler or torch_npu, and where a real driver is present.
    """
    reject_real_driver()
    libraries = str(build_libraries())
    result = dict(base)
    result["SOFTNPU_LIB"] = libraries
    result["LD_LIBRARY_PATH"] = prepend_path(libraries, base.get("LD_LIBRARY_PATH"))
    result["LD_PRELOAD"] = prepend_path(f"{libraries}/{PRELOADED}", base.get("LD_PRELOAD"))
    result.setdefault("RAY_LD_PRELOAD_ON_WORKERS", "1")
    result["PYTHONPATH"] = prepend_path(str(SITE), base.get("PYTHONPATH"))
    # Every stream is a thread, and every rank a process: more threads in each operator would only compete for cores.
    result.setdefault("OMP_NUM_THREADS", "1")
    return result
