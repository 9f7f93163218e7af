"""The tests of a released vLLM: its wheels leave them out, its source distribution has them."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BUILD_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "empty", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
"""`pip download` makes the metadata of what it loads: vLLM's own build script, with nothing to build."""


def installed_version() -> str:
    """Return the version of the installed vLLM, without a local part (``+cpu``)."""
    return importlib.metadata.version("vllm").partition("+")[0]


def cache() -> Path:
    """Return the folder outside the repository that keeps downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-ray-ascend" / "upstream"


def source_tree(version: str) -> Path:
    """Return a folder with vLLM's ``tests/`` of ``version``, downloaded unless it is there already.

    Raises subprocess.CalledProcessError where pip finds no source distribution.
    """
    folder = cache() / f"vllm-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive = _download(version, Path(temporary))
        _unpack_tests(archive, Path(temporary))
        (Path(temporary) / folder.name).rename(folder)  # atomically: an interrupted download leaves no half of it
    return folder


def _download(version: str, folder: Path) -> Path:
    print(f"downloading the source distribution of vLLM {version}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--dest", str(folder), f"vllm=={version}"]
    environment = {**os.environ, **BUILD_ENVIRONMENT, "VLLM_VERSION_OVERRIDE": version}
    subprocess.run(command, env=environment, check=True)
    return next(folder.glob("vllm-*.tar.gz"))


def _unpack_tests(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
        tar.extractall(folder, wanted, filter="data")
