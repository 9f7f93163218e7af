"""`make test-upstream`: vLLM's own tests on software NPUs. Arguments: groups of tests.txt, and after ``--`` pytest's.

Each group is a process of its own, in which Ray is started by the tests themselves, on this machine alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from softnpu.activate import SITE, make_environment, prepend_path

from ci.upstream.sources import installed_version, source_tree
from ci.upstream.table import TABLE, Group, parse
from demo.server import QUIET
from demo.train.recitation import DENSE, MOE

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "facebook/opt-125m": DENSE,
    "Qwen/Qwen3-0.6B": DENSE,
    "hmellor/tiny-random-LlamaForCausalLM": DENSE,
    "ibm-research/PowerMoE-3b": MOE,
}
"""What the tests name where any model does: here they are the demonstration's, found in Hugging Face's cache."""

_SITECUSTOMIZE = f"""import runpy, sys
if {str(SITE)!r} not in sys.path:
    sys.path.insert(0, {str(SITE)!r})
    runpy.run_path({str(SITE / "sitecustomize.py")!r})
"""
"""The tests give Ray's workers a PYTHONPATH of vLLM's source tree alone: there the software NPU has to be found."""

Counts = dict[str, dict[str, int]]


def main(arguments: list[str]) -> int:
    """Run the groups; 0 where every test that is not left out passes."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # on the way out, what was started is ended
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:split], arguments[split + 1 :]
    groups = [group for group in parse(TABLE.read_text()).groups if not names or group.name in names]
    version = installed_version()
    codes: dict[str, int] = {}
    counts: Counts = {}
    # A short path, since Ray's sockets are in it; what ends late may still write there while it is removed.
    with tempfile.TemporaryDirectory(prefix="upstream-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        sources = Path(temporary) / "vllm"
        shutil.copytree(source_tree(version), sources)
        variables = _variables(sources, Path(temporary))
        for group in groups:
            codes[group.name] = _run(group, sources, variables, Path(temporary), options)
            report = Path(temporary) / f"{group.name}.json"
            counts |= json.loads(report.read_text()) if report.exists() else {}
    _print(version, counts)
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}. One group again: make test-upstream GROUPS={failed[0]}")
    return 1 if failed else 0


def _run(group: Group, sources: Path, variables: Mapping[str, str], temporary: Path, options: list[str]) -> int:
    print(f"== {group.name}", flush=True)
    command = [sys.executable, "-m", "pytest", "-p", "ci.upstream.plugin", "-c", os.devnull, "--rootdir", str(sources)]
    command += ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "-ra", "--tb=short"]
    command += ["--disable-warnings", "--durations=10", f"--counts={temporary / group.name}.json", *options]
    process = subprocess.Popen([*command, *group.tests], cwd=sources, env=dict(variables), start_new_session=True)
    try:
        return process.wait(group.limit_s)
    except subprocess.TimeoutExpired:
        print(f"{group.name}: not done after {group.limit_s} s, ended", flush=True)
        return 1
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a group left running: all of its session, since some tests' processes make groups of their own."""
    for each in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(each.pid) == process.pid:
                each.kill()
    process.wait()


def _variables(sources: Path, temporary: Path) -> dict[str, str]:
    """Return the environment of the tests: software NPUs, a Ray of their own, models without a network."""
    (sources / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    for name, model in MODELS.items():
        _offer(name, model, temporary / "hf" / "hub")
    base = {**os.environ, **QUIET, "PYTHONPATH": prepend_path(str(sources), str(ROOT))}
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


def _offer(name: str, model: Path, hub: Path) -> None:
    """Put ``model`` into a Hugging Face cache as ``name``."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("demo")
    shutil.copytree(model, folder / "snapshots" / "demo")


def _print(version: str, counts: Counts) -> None:
    outcomes = ("passed", "failed", "left out")
    print(f"\nvLLM {version}'s tests" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for file, by_outcome in counts.items():
        print(f"{file:60}" + "".join(f"{by_outcome.get(outcome, 0):>10}" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
