"""The tests of released projects: wheels leave them out, source distributions have them."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.install import BUILD_ENVIRONMENT

FOLDERS = ("tests", "examples")
"""What tests read: some run examples."""


@dataclass(frozen=True)
class Project:
    """A project of a package index. `pip download` makes the metadata of what it loads, by the project's own build
    script, for which ``build`` are the variables; ``version_variable`` is the one that tells it its version."""

    name: str
    build: Mapping[str, str]
    version_variable: str = ""


VLLM = Project("vllm", {"VLLM_TARGET_DEVICE": "empty", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "VLLM_VERSION_OVERRIDE")
VLLM_ASCEND = Project("vllm-ascend", BUILD_ENVIRONMENT)


def installed_version(name: str) -> str:
    """Return the installed version of a distribution, without a local part (``+cpu``)."""
    return importlib.metadata.version(name).partition("+")[0]


def cache() -> Path:
    """Return the folder outside the repository that keeps downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-ray-ascend" / "upstream"


def source_tree(project: Project, version: str) -> Path:
    """Return a folder with a project's FOLDERS of ``version``, downloaded unless it is there already.

    Raises subprocess.CalledProcessError where pip finds no source distribution.
    """
    folder = cache() / f"{project.name}-{version}-tests"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive = _download(project, version, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        _unpack(archive, unpacked)
        next(unpacked.iterdir()).rename(folder)  # atomically: an interrupted download leaves no half of it
    return folder


def _download(project: Project, version: str, folder: Path) -> Path:
    print(f"downloading the source distribution of {project.name} {version}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--no-binary", project.name, "--no-build-isolation", "--dest", str(folder)]
    command.append(f"{project.name}=={version}")
    environment = {**os.environ, **project.build}
    if project.version_variable:
        environment[project.version_variable] = version
    subprocess.run(command, env=environment, check=True)
    return next(folder.glob("*.tar.gz"))


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if "".join(Path(member.name).parts[1:2]) in FOLDERS]
        tar.extractall(folder, wanted, filter="data")
