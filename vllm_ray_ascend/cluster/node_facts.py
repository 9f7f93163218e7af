"""What NPUs the node of this process really has, and with which environment Ray was started there.

Runs on every node, inside a Ray task: imports nothing heavy, and calls CANN in a process of its own, because CANN keeps
the visible list of a process's first call, and Ray's worker may serve other tasks later.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_ray_ascend import __version__
from vllm_ray_ascend.compat.versions import installed
from vllm_ray_ascend.devices.cards import Die, parse_npu_smi
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES
from vllm_ray_ascend.settings import PREFIX

NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
SWITCHES = (PREFIX, "VLLM_PLUGINS")

LIMIT_S = 10.0
"""Seconds that CANN's count may take: without it an engine does not start."""
_COUNT, _FAILED, _ACL = "npus=", "failed=", "acl=yes"  # prefixes, because CANN may log to standard output
_COUNT_SCRIPT = f"""
import ctypes
count = ctypes.c_uint32()
code = ctypes.CDLL("libascendcl.so").aclrtGetDeviceCount(ctypes.byref(count))
print(f"{_FAILED}aclrtGetDeviceCount returned CANN error {{code}}" if code else f"{_COUNT}{{count.value}}", flush=True)
import acl
acl.rt.get_device_count
print("{_ACL}")
"""


@dataclass(frozen=True)
class NodeFacts:
    """What one node has. Plain values only: versions of this package exchange them as a dictionary."""

    address: str
    """Ray's address of the node."""
    hostname: str
    visible_devices: str | None = None
    """ASCEND_RT_VISIBLE_DEVICES with which Ray was started, None if unset."""
    noset: str | None = None
    """RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES with which Ray was started."""
    cann_devices: int | None = None
    """NPUs that CANN counts without any visible list; None where that fails, and ``cann_error`` is the reason."""
    cann_error: str | None = None
    device_files: tuple[int, ...] = ()
    """Numbers of /dev/davinci*. A container may have 4 to 7 only, which CANN then numbers 0 to 3."""
    npu_smi: int | None = None
    """NPUs that `npu-smi info -m` lists; None without npu-smi."""
    dies: tuple[Die, ...] = ()
    """The same NPUs with their cards."""
    acl_importable: bool = False
    """Whether Ray finds NPUs through CANN's Python module `acl`."""
    switches: Mapping[str, str] = field(default_factory=dict)
    """Values of SWITCHES, where they are set in the environment in which Ray was started."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Versions of vllm-ray-ascend and vllm-ascend, None where not installed."""


def node_facts_from_dict(values: Mapping[str, Any]) -> NodeFacts:
    """Return NodeFacts from a dictionary that another version of this package may have made."""
    known = {entry.name for entry in fields(NodeFacts)}
    kept = {name: value for name, value in values.items() if name in known}
    dies = tuple(Die(**die) for die in kept.get("dies", ()))
    return NodeFacts(**{**kept, "device_files": tuple(kept.get("device_files", ())), "dies": dies})


def collect_node_facts(address: str = "", limit_s: float = LIMIT_S) -> NodeFacts:
    """Return the facts of this process's node, whose address for Ray is ``address``, within ``limit_s`` seconds.

    What cannot be determined is None: nothing is raised.
    """
    deadline = time.monotonic() + limit_s
    started = raylet_environment()
    unlimited = {name: value for name, value in os.environ.items() if name != VISIBLE_DEVICES}
    cann = _start_process([sys.executable, "-c", _COUNT_SCRIPT], unlimited)  # in parallel: each can take long
    smi = _start_process(["npu-smi", "info", "-m"], unlimited)
    stdout, stderr = _wait_for_output(cann, deadline)
    dies = tuple(parse_npu_smi(_wait_for_output(smi, deadline)[0]))
    cann_devices, cann_error, acl_importable = parse_cann_output(stdout, stderr)
    return NodeFacts(
        address=address,
        hostname=socket.gethostname(),
        visible_devices=started.get(VISIBLE_DEVICES),
        noset=started.get(NOSET),
        cann_devices=cann_devices,
        cann_error=cann_error,
        device_files=_device_file_numbers(),
        npu_smi=len(dies) or None,
        dies=dies,
        acl_importable=acl_importable,
        switches={name: started[name] for name in SWITCHES if name in started},
        versions={"vllm-ray-ascend": __version__, "vllm-ascend": installed("vllm-ascend")},
    )


def raylet_environment() -> Mapping[str, str]:
    """Return the environment with which Ray was started here; this process's where that cannot be read.

    A task's own can differ: Ray sets the visible list for it, and the job's runtime_env sets any variable.
    """
    try:
        text = Path(f"/proc/{int(os.environ['RAY_RAYLET_PID'])}/environ").read_bytes().decode(errors="replace")
    except (KeyError, ValueError, OSError):
        return os.environ
    pairs = (entry.partition("=") for entry in text.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs} or os.environ


def parse_cann_output(stdout: str, stderr: str) -> tuple[int | None, str | None, bool]:
    """Return CANN's count, why there is none, and whether `acl` can be imported, from the counting process's output."""
    lines = stdout.splitlines()
    counts = [line.removeprefix(_COUNT) for line in lines if line.startswith(_COUNT)]
    if counts:
        return int(counts[-1]), None, _ACL in lines
    failures = [line.removeprefix(_FAILED) for line in lines if line.startswith(_FAILED)] or stderr.strip().splitlines()
    return None, failures[-1] if failures else "CANN's device count ended without output", _ACL in lines


def _device_file_numbers() -> tuple[int, ...]:
    numbers = (path.name.removeprefix("davinci") for path in Path("/dev").glob("davinci[0-9]*"))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


def _start_process(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError:
        return None


def _wait_for_output(process: subprocess.Popen[str] | None, deadline: float) -> tuple[str, str]:
    """Return what the process wrote to standard output and error; it is killed at the deadline."""
    if process is None:
        return "", "it could not be started"
    with process:
        try:
            return process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0], "no answer in time"
