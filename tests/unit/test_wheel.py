"""Wheels and sdists of both distributions: what is in them, and that each works without torch, vLLM and Ray."""

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
from typing import NamedTuple

import pytest
from packaging.utils import canonicalize_name

import softnpu
import vllm_ray_ascend

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
NEWER = "9999.0"
STACK = {"vllm-ascend", "torch-npu", "ray"}
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "VLLM_RAY_ASCEND", "SOFTNPU", "LD_PRELOAD"))
}


class Distribution(NamedTuple):
    """One distribution of this repository. ``folder`` and ``source`` (below it) are relative to the repository."""

    name: str
    folder: str
    source: str
    package: str
    version: str
    needs: tuple[str, ...]
    extra_files: frozenset[str]
    """Files in the sdist beside the package."""

    def package_files(self) -> set[str]:
        """Return the files of the package, relative to the folder that holds it."""
        base = ROOT / self.folder / self.source
        files = (path.relative_to(base) for path in (base / self.package).rglob("*") if path.is_file())
        return {str(path) for path in files if "__pycache__" not in path.parts}


PLUGIN = Distribution(
    "vllm-ray-ascend",
    "",
    "",
    "vllm_ray_ascend",
    vllm_ray_ascend.__version__,
    ("msgspec", "packaging", "psutil"),
    frozenset({"pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}),
)
EMULATOR = Distribution(
    "ascend-softnpu",
    "softnpu",
    "src",
    "softnpu",
    softnpu.__version__,
    ("packaging",),
    frozenset({"pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE"}),
)
BOTH = pytest.mark.parametrize("one", [PLUGIN, EMULATOR], ids=lambda one: one.name)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd, env=CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist of the distribution in ``source``; returns its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Build wheel and sdist of both distributions, by name and kind; the emulator's wheel from its own sdist."""
    target = tmp_path_factory.mktemp("dist")
    found = {
        (one.name, kind): build(kind, source / one.folder, target)
        for one in (PLUGIN, EMULATOR)
        for kind in ("sdist", "wheel")
    }
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(found[EMULATOR.name, "sdist"]) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    found[EMULATOR.name, "wheel of sdist"] = build("wheel", folder, tmp_path_factory.mktemp("dist-of-sdist"))
    return found


@BOTH
def test_a_wheel_holds_its_package_and_nothing_else(built: dict[tuple[str, str], Path], one: Distribution) -> None:
    names = zipfile.ZipFile(built[one.name, "wheel"]).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == one.package_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert f"{one.package}/py.typed" in package


def test_the_plugins_wheel_holds_no_cpp_and_nothing_of_the_emulator(built: dict[tuple[str, str], Path]) -> None:
    names = zipfile.ZipFile(built[PLUGIN.name, "wheel"]).namelist()
    assert not [name for name in names if name.endswith((".cpp", ".h", ".so")) or "softnpu" in name]


@BOTH
def test_an_sdist_holds_the_sources_to_build_the_wheel_and_nothing_else(
    built: dict[tuple[str, str], Path], one: Distribution
) -> None:
    with tarfile.open(built[one.name, "sdist"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name}
    package = {str(Path(one.source) / name) for name in one.package_files()}
    assert names - made - {"setup.cfg"} == package | (one.extra_files - {"setup.cfg"})


def test_the_emulators_sdist_builds_alone(built: dict[tuple[str, str], Path]) -> None:
    first, second = (zipfile.ZipFile(built[EMULATOR.name, kind]).namelist() for kind in ("wheel", "wheel of sdist"))
    assert set(first) == set(second)


@BOTH
def test_metadata(one: Distribution) -> None:
    metadata = distribution(one.name).metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.13,>=3.10"
    needs = [each for each in metadata.get_all("Requires-Dist") or [] if "extra ==" not in each]
    assert sorted(needs) == sorted(one.needs)
    assert any(url.startswith("Source, https://") for url in metadata.get_all("Project-URL") or [])


def install_alone(wheel: Path, one: Distribution, home: Path) -> Path:
    """Install a wheel and what it needs into a new virtual environment; returns that environment's folder bin."""
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    target = next((home / "lib").glob("python*/site-packages"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    for name in one.needs:  # as installed here: no network in tests
        for file in distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(Path(str(file.locate())).read_bytes())
    return home / "bin"


def test_the_plugin_works_in_an_empty_environment(built: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    programs = install_alone(built[PLUGIN.name, "wheel"], PLUGIN, tmp_path / "venv")
    command, python = programs / "vllm-ray-ascend", programs / "python"
    assert run(command, "--version", cwd=tmp_path) == f"vllm-ray-ascend {PLUGIN.version}\n"
    assert "env" in run(command, "--help", cwd=tmp_path)
    assert "VLLM_RAY_ASCEND_EXECUTOR=ours" in run(command, "env", cwd=tmp_path)
    run(python, "-c", "import vllm_ray_ascend.plugin as p; assert p.platform() is None; p.general()", cwd=tmp_path)
    failed = subprocess.run([command, "topology"], capture_output=True, text=True, cwd=tmp_path, env=CLEAN)
    assert failed.returncode == 2 and failed.stderr.startswith("vllm-ray-ascend: VRA-143: ")
    run(python, "-c", "import importlib.util as u; assert u.find_spec('softnpu') is None", cwd=tmp_path)
    assert not (programs / "softnpu").exists()


def test_the_emulator_works_in_an_empty_environment(built: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    programs = install_alone(built[EMULATOR.name, "wheel of sdist"], EMULATOR, tmp_path / "venv")
    command = programs / "softnpu"
    assert run(command, "--version", cwd=tmp_path) == f"softnpu {EMULATOR.version}\n"
    for arguments, message in (
        (("cluster", "up"), "`softnpu cluster` needs Ray, which is not installed: python -m pip install"),
        (("exec", "--", "true"), "needs the package torch"),
    ):
        done = subprocess.run([command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=CLEAN)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("softnpu: ") and message in line
    # Its sitecustomize does no harm to a Python in which it is not installed.
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages")) / "softnpu" / "site"
    bare = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); import sitecustomize"],
        capture_output=True,
        text=True,
        env=CLEAN,
        cwd=tmp_path,
    )
    assert (bare.returncode, bare.stderr) == (0, "")


@pytest.fixture(scope="module")
def newer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of the plugin with a version that is installed nowhere."""
    copy = tmp_path_factory.mktemp("newer")
    for name in (*PLUGIN.package_files(), *PLUGIN.extra_files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((source / name).read_bytes())
    init = copy / "vllm_ray_ascend" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{PLUGIN.version}"', f'"{NEWER}"'))
    return build("wheel", copy, tmp_path_factory.mktemp("newer-dist"))


BESIDE = pytest.mark.skipif(
    not {canonicalize_name(each.name) for each in distributions()} >= STACK, reason="needs vllm-ascend"
)


@BESIDE
def test_pip_would_install_nothing_else_beside_vllm_ascend(newer: Path) -> None:
    """Nothing is downloaded: all that it needs is there, in whatever version."""
    report = run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--disable-pip-version-check"),
        *("--report", "-", newer),
    )
    names = [each["metadata"]["name"] for each in json.loads(report)["install"]]
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
    packages = json.loads(run(*pip, "list", "--format", "json"))
    return {canonicalize_name(each["name"]): each["version"] for each in packages}


def checked(pip: tuple[str | Path, ...]) -> list[str]:
    """Return the complaints of `pip check`: the demonstration's versions break some requirements on purpose."""
    done = subprocess.run([*map(str, pip), "check"], capture_output=True, text=True, timeout=300, env=CLEAN)
    return sorted(line for line in done.stdout.splitlines() if "vllm-ray-ascend" not in line or NEWER in line)
