"""What NPUs the node of this process really has, and with which environment Ray was started there.

Runs on every node, inside a Ray task: imports nothing heavy, and asks CANN in a process of its own, because CANN keeps
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
from vllm_ray_ascend.devices.visible import VARIABLE
from vllm_ray_ascend.settings import PREFIX

NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
SWITCHES = (PREFIX, "VLLM_PLUGINS")

_LIMIT_S = 10.0
_COUNT, _FAILED, _ACL = "npus=", "failed=", "acl=yes"  # marked, because CANN may log to standard output
_ASK_CANN = f"""
import ctypes
count = ctypes.c_uint32()
code = ctypes.CDLL("libascendcl.so").aclrtGetDeviceCount(ctypes.byref(count))
print(f"{_FAILED}aclrtGetDeviceCount gave CANN error {{code}}" if code else f"{_COUNT}{{count.value}}", flush=True)
import acl
acl.rt.get_device_count
print("{_ACL}")
"""


@dataclass(frozen=True)
class NodeFacts:
    """One node as it is. Plain values only: they travel as a dictionary between versions of this package."""

    address: str
    """Ray's address of the node."""
    hostname: str
    visible: str | None = None
    """ASCEND_RT_VISIBLE_DEVICES with which Ray was started, None if unset."""
    noset: str | None = None
    """RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES with which Ray was started."""
    cann_devices: int | None = None
    """NPUs that CANN counts without any visible list; None where it does not tell, and ``cann_error`` says why."""
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
    """Those of SWITCHES that are set where Ray was started."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Versions of vllm-ray-ascend and vllm-ascend, None where not installed."""


def facts_of(values: Mapping[str, Any]) -> NodeFacts:
    """NodeFacts from a dictionary that another version of this package may have made."""
    known = {entry.name for entry in fields(NodeFacts)}
    kept = {name: value for name, value in values.items() if name in known}
    dies = tuple(Die(**die) for die in kept.get("dies", ()))
    return NodeFacts(**{**kept, "device_files": tuple(kept.get("device_files", ())), "dies": dies})


def collect(address: str = "", limit_s: float = _LIMIT_S) -> NodeFacts:
    """The facts of this process's node, whose address for Ray is ``address``, within ``limit_s`` seconds.

    What cannot be told is None: nothing is raised.
    """
    deadline = time.monotonic() + limit_s
    started = raylet_environment()
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}
    cann = _start([sys.executable, "-c", _ASK_CANN], own)  # both at once: each can take long on a real node
    smi = _start(["npu-smi", "info", "-m"], own)
    answer, complaint = _finish(cann, deadline)
    dies = tuple(parse_npu_smi(_finish(smi, deadline)[0]))
    devices, error, acl = read_cann(answer, complaint)
    return NodeFacts(
        address=address,
        hostname=socket.gethostname(),
        visible=started.get(VARIABLE),
        noset=started.get(NOSET),
        cann_devices=devices,
        cann_error=error,
        device_files=_device_files(),
        npu_smi=len(dies) or None,
        dies=dies,
        acl_importable=acl,
        switches={name: started[name] for name in SWITCHES if name in started},
        versions={"vllm-ray-ascend": __version__, "vllm-ascend": installed("vllm-ascend")},
    )


def raylet_environment() -> Mapping[str, str]:
    """The environment with which Ray was started here; this process's where that cannot be read.

    A task's own can differ: Ray sets the visible list for it, and the job's runtime_env sets whatever it says.
    """
    try:
        text = Path(f"/proc/{int(os.environ['RAY_RAYLET_PID'])}/environ").read_bytes().decode(errors="replace")
    except (KeyError, ValueError, OSError):
        return os.environ
    pairs = (entry.partition("=") for entry in text.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs} or os.environ


def read_cann(answer: str, complaint: str) -> tuple[int | None, str | None, bool]:
    """CANN's count, why there is none, and whether `acl` can be imported, from what the asking process wrote."""
    lines = answer.splitlines()
    counts = [line.removeprefix(_COUNT) for line in lines if line.startswith(_COUNT)]
    if counts:
        return int(counts[-1]), None, _ACL in lines
    told = [line.removeprefix(_FAILED) for line in lines if line.startswith(_FAILED)] or complaint.strip().splitlines()
    return None, told[-1] if told else "CANN's device count ended without a word", _ACL in lines


def _device_files() -> tuple[int, ...]:
    numbers = (path.name.removeprefix("davinci") for path in Path("/dev").glob("davinci[0-9]*"))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
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


def _finish(process: subprocess.Popen[str] | None, deadline: float) -> tuple[str, str]:
    """What the process wrote, to standard output and error; it is killed at the deadline."""
    if process is None:
        return "", "it could not be started"
    with process:
        try:
            return process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0], "no answer in time"
