"""Each patch in patches/: its check fails with the released package, and passes with the patched one.

A project's checks are one script, which is run twice: with the package as it is, and with all patches of the project.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ci import matrix
from ci.check_patches import Patch, series
from ci.releases import fetch
from tests.patches.overlay import overlay
from tests.patches.report import read

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
ON_SOFTWARE_NPUS = ("vllm", "vllm-ascend")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


CLUSTERS = dict.fromkeys(("vllm-0004", "vllm-0005", "vllm-0008", "vllm-0009"), "check_vllm_cluster")
"""Checks that need a Ray cluster of two nodes, with vLLM in its workers."""
SLOW = {*CLUSTERS, "ray-0002"}


def script_of(patch: Patch) -> str:
    return CLUSTERS.get(patch.test, f"check_{patch.project.replace('-', '_')}")


@pytest.mark.parametrize(
    "patch",
    [pytest.param(each, id=each.test, marks=[pytest.mark.slow] if each.test in SLOW else []) for each in series()],
)
def test_the_defect_is_there_and_the_patch_fixes_it(patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    before, after = (run_checks(script_of(patch), patch.project, patched, base) for patched in (False, True))
    assert before[patch.test], "the released package does without the patch: is the defect gone, or the check no good?"
    assert patch.shows in before[patch.test], "not the defect that the patch fixes"
    assert not after[patch.test]


@functools.cache
def run_checks(script: str, project: str, patched: bool, base: Path) -> dict[str, str]:
    """Run a script of checks; return by patch why its check failed, an empty text where it passed."""
    package = package_of(project)
    folder = base / f"{script}-{'patched' if patched else 'released'}"
    folder.mkdir(exist_ok=True)
    paths = [str(folder), str(package.parent), str(ROOT)]
    if patched:
        overlay(package, [patch for patch in series() if patch.project == project], folder)
    command = [sys.executable, "-m", f"tests.patches.{script}"]
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths), "VLLM_RAY_ASCEND": "0"}
    if project in ON_SOFTWARE_NPUS:
        command = [str(Path(sys.executable).parent / "softnpu"), "exec", "--", *command]
    else:
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # it would look for CANN
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    return read(ended.stdout + ended.stderr)


def package_of(project: str) -> Path:
    """Return the installed package; else the released source of the newest supported release."""
    name = project.replace("-", "_")
    spec = find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    version = matrix.read().versions(project)[-1]
    sources = fetch(project, version, ())
    return fetch(project, version, sources.names).folder / name
