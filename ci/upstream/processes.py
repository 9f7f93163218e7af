"""The processes of upstream's tests: groups of a table on software NPUs, and what their tests counted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from softnpu.activate import SITE, make_environment, prepend_path

from ci.upstream.table import Group
from demo.server import QUIET

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ("passed", "failed", "left out")
_SITECUSTOMIZE = f"""import runpy, sys
if {str(SITE)!r} not in sys.path:
    sys.path.insert(0, {str(SITE)!r})
    runpy.run_path({str(SITE / "sitecustomize.py")!r})
"""

Counts = dict[str, dict[str, int]]
"""How many tests of each file had which of OUTCOMES."""


@dataclass(frozen=True)
class Harness:
    """What all groups of a table share: pytest's plugins and options, the tests' folder, and their environment."""

    table: Path
    plugins: tuple[str, ...]
    sources: Path
    variables: Mapping[str, str]
    options: tuple[str, ...] = ()

    def run(self, group: Group) -> tuple[bool, Counts]:
        """Run a group; returns whether all of it passed, and the counts."""
        print(f"== {group.name}", flush=True)
        passed, counts = True, Counts()
        for tests in group.runs():
            passed &= self._run(tests, group.limit_s)
            if self._report.exists():
                counts |= json.loads(self._report.read_text())
        return passed, counts

    @property
    def _report(self) -> Path:
        return self.sources.parent / "counts.json"

    def _run(self, tests: tuple[str, ...], limit_s: int) -> bool:
        self._report.unlink(missing_ok=True)
        process = subprocess.Popen(
            [*self._command(), *tests], cwd=self.sources, env=dict(self.variables), start_new_session=True
        )
        try:
            return process.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            print(f"{' '.join(tests)}: not done after {limit_s} s, ended", flush=True)
            return False
        finally:
            _end(process)

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(self.sources)]
        command += [option for plugin in ("ci.upstream.rule", *self.plugins) for option in ("-p", plugin)]
        command += ["-p", "no:cacheprovider", "-ra", "--tb=short", "--disable-warnings", "--durations=10"]
        return [*command, f"--counts={self._report}", f"--table={self.table}", *self.options]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a group left running: all of its session, since some tests' processes make groups of their own."""
    for each in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(each.pid) == process.pid:
                each.kill()
    process.wait()


def make_variables(temporary: Path, models: Mapping[str, Path]) -> dict[str, str]:
    """Return the environment of the tests: software NPUs, a Ray of their own, models without a network."""
    for name, model in models.items():
        _offer(name, model, temporary / "hf" / "hub")
    base = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    base["PATH"] = prepend_path(str(Path(sys.executable).parent), os.environ["PATH"])  # tests call torchrun and vllm
    base.pop("RAY_ADDRESS", None)
    return {
        **make_environment(base),
        "HF_HOME": str(temporary / "hf"),
        "HF_HUB_OFFLINE": "1",
        "RAY_TMPDIR": str(temporary),
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 4}),  # what bundles of four NPUs ask for beside them
        "SOFTNPU_NODE": temporary.name,
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # tests ask for the lengths of the models that they name
    }


def import_tests_from(sources: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the tests' tree as a place of imports, where the software NPU is found too: tests
    give Ray's workers a PYTHONPATH of that tree alone."""
    (sources / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return {**variables, "PYTHONPATH": prepend_path(str(SITE), prepend_path(str(sources), variables["PYTHONPATH"]))}


def _offer(name: str, model: Path, hub: Path) -> None:
    """Put ``model`` into a Hugging Face cache as ``name``."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("demo")
    shutil.copytree(model, folder / "snapshots" / "demo")


def print_counts(title: str, counts: Counts) -> None:
    """Print how many tests of each file had which outcome, and the sums."""
    print(f"\n{title:80}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    sums = {outcome: sum(each.get(outcome, 0) for each in counts.values()) for outcome in OUTCOMES}
    for file, by_outcome in (*sorted(counts.items()), ("all", sums)):
        print(f"{file:80}" + "".join(f"{by_outcome.get(outcome, 0):>10}" for outcome in OUTCOMES), flush=True)
