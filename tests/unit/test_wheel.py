"""Wheel and sdist: what is in them, and that the wheel works where there is no torch, vLLM or Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from vllm_ray_ascend import __version__

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_ray_ascend"
NEEDED = ("msgspec", "packaging", "psutil")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_RAY_ASCEND"))}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd, env=CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("wheel", "sdist"):
        run(
            sys.executable,
            "-c",
            f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})",
            cwd=copy,
        )
    return folder


def sources() -> set[str]:
    """Files of the package that have to be in it, relative to the repository."""
    files = (path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == sources()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_sources_to_build_the_wheel(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() | {"pyproject.toml", "LICENSE", "CHANGELOG.md"} <= names


def test_metadata() -> None:
    metadata = distribution("vllm-ray-ascend").metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.13,>=3.10"
    assert sorted(metadata.get_all("Requires-Dist") or []) == sorted(NEEDED)


def test_the_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    target = next((home / "lib").glob("python*/site-packages"))
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", next(built.glob("*.whl"))
    )
    for name in NEEDED:  # as installed here: no network in tests
        for file in distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(Path(str(file.locate())).read_bytes())
    command = home / "bin" / "vllm-ray-ascend"
    assert run(command, "--version", cwd=tmp_path) == f"vllm-ray-ascend {__version__}\n"
    assert "softnpu" in run(command, "--help", cwd=tmp_path) and "env" in run(command, "--help", cwd=tmp_path)
    assert "VLLM_RAY_ASCEND_EXECUTOR=ours" in run(command, "env", cwd=tmp_path)
    run(python, "-c", "import vllm_ray_ascend.plugin as p; assert p.platform() is None; p.general()", cwd=tmp_path)
