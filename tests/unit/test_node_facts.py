"""The facts of this machine, whatever it is, and parsing of what CANN, npu-smi and Ray's raylet report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cluster.node_facts import (
    NodeFacts,
    collect_node_facts,
    node_facts_from_dict,
    parse_cann_output,
    raylet_environment,
)

pytestmark = pytest.mark.unit

TABLE = """\
NPU ID   Chip ID   Chip Logic ID   Chip Name
0        0         0               Ascend 910B1
0        1         -               Mcu
1        0         1               Ascend 910B1
1        1         -               Mcu
"""


@pytest.fixture
def raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process with an environment of its own, in the place of the raylet that started this one."""
    own = {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "VLLM_PLUGINS": "ascend", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", "print('started', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n", "/proc shows it all by now"
        monkeypatch.setenv("RAY_RAYLET_PID", str(process.pid))
        yield
        process.kill()


def npu_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_facts_of_this_machine() -> None:
    started = time.monotonic()
    facts = collect_node_facts("10.0.0.1")
    assert time.monotonic() - started < 5, "half a second on a machine at rest"
    assert facts.address == "10.0.0.1" and facts.hostname == os.uname().nodename
    assert (facts.cann_devices is None) == (facts.cann_error is not None)
    assert facts.versions["vllm-ray-ascend"] == __version__


def test_facts_are_exchanged_as_json_between_versions() -> None:
    facts = collect_node_facts()
    plain = json.loads(json.dumps(asdict(facts)))
    assert node_facts_from_dict({**plain, "of_a_later_version": 1}) == facts
    assert node_facts_from_dict({"address": "10.0.0.1", "hostname": "a"}) == NodeFacts("10.0.0.1", "a")


@pytest.mark.usefixtures("raylet")
def test_ray_was_started_with_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("VLLM_RAY_ASCEND", "0")
    facts = collect_node_facts()
    assert (facts.visible_devices, facts.noset, facts.switches) == ("4,5", None, {"VLLM_PLUGINS": "ascend"})


@pytest.mark.parametrize("pid", [None, "", "none", "999999999"])
def test_without_a_raylet_the_environment_is_this_processs(pid: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if pid is None:
        monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    else:
        monkeypatch.setenv("RAY_RAYLET_PID", pid)
    assert raylet_environment() is os.environ


@pytest.mark.parametrize(
    ("stdout", "stderr", "expected"),
    [
        ("npus=8\nacl=yes\n", "", (8, None, True)),
        ("[INFO] a log line of CANN\nnpus=8\n", "ModuleNotFoundError: No module named 'acl'", (8, None, False)),
        ("failed=returned CANN error 107002\nacl=yes\n", "", (None, "returned CANN error 107002", True)),
        ("", "Traceback\nOSError: libascendcl.so: cannot open", (None, "OSError: libascendcl.so: cannot open", False)),
        ("npus=8\n", "no answer in time", (8, None, False)),
        ("", "no answer in time", (None, "no answer in time", False)),
        ("", "", (None, "CANN's device count ended without output", False)),
    ],
)
def test_parse_cann_output(stdout: str, stderr: str, expected: tuple[int | None, str | None, bool]) -> None:
    assert parse_cann_output(stdout, stderr) == expected


def test_npu_smi_counts_no_management_chips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table").write_text(TABLE)
    npu_smi(tmp_path, monkeypatch, f'test "$*" = "info -m" && cat {tmp_path}/table')
    assert collect_node_facts().npu_smi == 2


def test_npu_smi_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npu_smi(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    started = time.monotonic()
    assert collect_node_facts(limit_s=1).npu_smi is None
    assert time.monotonic() - started < 10
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
