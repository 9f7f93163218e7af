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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ray_ascend import __version__
from vllm_ray_ascend.compat.versions import installed
from vllm_ray_ascend.devices.cards import Die, parse_npu_smi
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES
from vllm_ray_ascend.settings import PREFIX

NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
SWITCHES = (PREFIX, "VLLM_PLUGINS")

LIMIT_S = 10.0
"""Seconds that CANN's count may take: without it an engine does not start."""
LATE = "no answer in time"
STUCK = "does not end, not even when it is killed: the NPU's driver hangs"
_AFTER_KILL_S = 1.0
"""For a process to be gone. One that waits inside the driver stays, whoever waits for it."""
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


class ProgramOutput(NamedTuple):
    """What a program wrote, and its exit code: None where it did not end in time, and ``stderr`` says that alone."""

    code: int | None
    stdout: str
    stderr: str = ""


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
    return collect_facts_and_list(address, limit_s)[0]


def collect_facts_and_list(address: str, limit_s: float) -> tuple[NodeFacts, ProgramOutput | None]:
    """Return these facts, and what `npu-smi info -m` wrote; None without npu-smi."""
    deadline = time.monotonic() + limit_s
    started = raylet_environment()
    unlimited = {name: value for name, value in os.environ.items() if name != VISIBLE_DEVICES}
    cann = start_program([sys.executable, "-c", _COUNT_SCRIPT], unlimited)  # in parallel: each can take long
    try:
        smi = start_program(["npu-smi", "info", "-m"], unlimited, subprocess.STDOUT)
    except OSError:
        smi = None
    counted = wait_for_output(cann, deadline)
    listed = wait_for_output(smi, deadline) if smi else None
    dies = tuple(parse_npu_smi(listed.stdout)) if listed else ()
    cann_devices, cann_error, acl_importable = parse_cann_output(counted.stdout, counted.stderr)
    facts = NodeFacts(
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
    return facts, listed


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


def start_program(
    command: Sequence[str], environment: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a program for `wait_for_output`. Raise OSError where it is not there, or cannot be run."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
    )


def wait_for_output(process: subprocess.Popen[str], deadline: float) -> ProgramOutput:
    """Return what a program wrote. At the deadline it is killed, and left alone where it stays all the same."""
    try:
        stdout, stderr = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        return ProgramOutput(process.returncode, stdout, stderr or "")
    except subprocess.TimeoutExpired:
        process.kill()
    try:
        return ProgramOutput(None, process.communicate(timeout=_AFTER_KILL_S)[0], LATE)
    except subprocess.TimeoutExpired as late:  # `with process` would wait for it without a limit
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
        written = (late.output or b"").decode(errors="replace")
        return ProgramOutput(None, written, LATE if process.poll() is not None else f"it {STUCK}")
