"""Wheel and sdist: what is in them, and that the wheel works where there is no torch, vLLM or Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from vllm_ray_ascend import __version__

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_ray_ascend"
NEEDED = ("msgspec", "packaging", "psutil")
NEWER = "9999.0"
STACK = {"vllm-ascend", "torch-npu", "ray"}
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


def test_the_sdist_holds_the_sources_to_build_the_wheel_and_nothing_else(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name}
    needed = {"pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    assert names - made == sources() | needed


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


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a version that is installed nowhere."""
    copy, folder = tmp_path_factory.mktemp("newer"), tmp_path_factory.mktemp("newer-dist")
    for name in (*sources(), "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    init = copy / "vllm_ray_ascend" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', f'"{NEWER}"'))
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})", cwd=copy)
    return next(folder.glob("*.whl"))


BESIDE = pytest.mark.skipif(
    not {canonicalize_name(each.name) for each in distributions()} >= STACK, reason="needs vllm-ascend"
)


@BESIDE
def test_pip_would_install_nothing_else_beside_vllm_ascend(newer: Path) -> None:
    """Nothing is downloaded: all that it needs is there, in whatever version."""
    told = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--disable-pip-version-check"),
        *("--report", "-", newer),
    )
    names = [each["metadata"]["name"] for each in json.loads(told)["install"]]
    assert names == ["vllm-ray-ascend"]


@BESIDE
def test_an_installation_beside_vllm_ascend_changes_no_other_package(newer: Path, tmp_path: Path) -> None:
    """Really installed, in an environment that stands on this one and finds its packages."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    own = next((home / "lib").glob("python*/site-packages"))
    (own / "below.pth").write_text(f"{Path(str(distribution('vllm-ascend').locate_file('')))}\n")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check")
    before = listed(pip)
    complaints = checked(pip)
    assert set(before) >= STACK
    run(*pip, "install", "--no-index", newer)
    after = listed(pip)
    assert after.pop("vllm-ray-ascend") == NEWER
    before.pop("vllm-ray-ascend", None)
    assert after == before
    assert checked(pip) == complaints
    assert {path.name for path in own.iterdir()} == {
        "below.pth",
        "vllm_ray_ascend",
        f"vllm_ray_ascend-{NEWER}.dist-info",
    }


def listed(pip: tuple[str | Path, ...]) -> dict[str, str]:
    told = json.loads(run(*pip, "list", "--format", "json"))
    return {canonicalize_name(each["name"]): each["version"] for each in told}


def checked(pip: tuple[str | Path, ...]) -> list[str]:
    """What `pip check` complains of: the demonstration's packages are chosen by hand, against some of their wishes."""
    done = subprocess.run([*map(str, pip), "check"], capture_output=True, text=True, timeout=300, env=CLEAN)
    return sorted(line for line in done.stdout.splitlines() if "vllm-ray-ascend" not in line or NEWER in line)
