"""Released sources of upstream, without installing or building them, and without more of them than is read.

A wheel is a zip file: its directory and single files are had by HTTP range requests, 50 ms each. Sources that were only
released as an archive, or an index that knows no ranges, are downloaded whole. All of it is kept (`cache`); of a
compiled module only the identifiers among its texts are, a line each.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

NAMES = ".names.json"
"""In the folder of a release: all files that it has, whether they are here or not."""
COMPILED = ".so"
_IDENTIFIER = re.compile(rb"(?<=\0)[a-z_]\w+(?=\0)")
"""A text of a compiled module that a Python function could be named by: no class, and no mangled C++ name."""
_CHUNK = 1 << 20


class ReleaseError(Exception):
    """A released source is not available."""


@dataclass(frozen=True)
class Sources:
    """One release of a project, as far as it was read."""

    project: str
    version: str
    folder: Path
    names: frozenset[str]
    """Every Python file and compiled module of the release, by its path in the package."""

    def text(self, name: str) -> str | None:
        """Return a file of the release, of a compiled module its identifiers; None where it has none of this name."""
        return (self.folder / name).read_text() if name in self.names else None


def cache() -> Path:
    """Return the folder outside the repository that keeps downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-ray-ascend"


def fetch(project: str, version: str, wanted: Iterable[str]) -> Sources:
    """Return the files ``wanted`` of a release, such as "vllm/envs.py", as far as it has them.

    Raises ReleaseError where the index does not have the release, or does not answer.
    """
    folder = cache() / "sources" / f"{project}-{version}"
    names = _names(folder)
    wanted = list(wanted)
    if names is None or any(_is_missing(folder / name, name in names) for name in wanted):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _read(project, version, folder, wanted)
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise ReleaseError(f"{project} {version} could not be read: {error!r}") from error
        names = _names(folder)
    return Sources(project, version, folder, frozenset(names or ()))


def _is_missing(path: Path, is_listed: bool) -> bool:
    """Whether a file is to be had but is not here. Lists that were kept earlier may lack the compiled modules."""
    return (is_listed or path.suffix == COMPILED) and not path.is_file()


def released(project: str) -> list[str]:
    """Return all versions that the index has, pre-releases too, in no order."""
    return sorted({str(package.version) for package in _finder().find_all_packages(project, allow_yanked=True)})


def _names(folder: Path) -> list[str] | None:
    try:
        names: list[str] = json.loads((folder / NAMES).read_text())
    except FileNotFoundError:
        return None
    return names


def _read(project: str, version: str, folder: Path, wanted: list[str]) -> None:
    """Put the files ``wanted`` into ``folder`` and write down which there are."""
    links = _links(project, version)
    wheels = sorted((name for name in links if name.endswith(".whl")), key=lambda name: ("x86_64" not in name, name))
    package = project.replace("-", "_") + "/"
    if wheels:
        with _wheel(links[wheels[0]], folder) as archive:
            names = [name for name in archive.namelist() if _counts(name, package)]
            for name in set(wanted) & set(names):
                content = archive.read(name)
                _write(folder / name, _identifiers(content) if name.endswith(COMPILED) else content)
    else:
        names = _unpack(links[min(links)], folder, package)
    _write(folder / NAMES, json.dumps(sorted(names)).encode())


def _links(project: str, version: str) -> dict[str, str]:
    """Return the addresses of a release's files by their names."""
    from packaging.version import Version

    found = {
        package.link.filename: package.link.normalized
        for package in _finder().find_all_packages(project, allow_yanked=True)
        if package.version is not None and Version(str(package.version)) == Version(version)
    }
    if not found:
        raise ReleaseError(f"the package index has no {project} {version}: correct its line in ci/matrix.toml")
    return found


@functools.cache
def _finder() -> Any:
    """Return where pip looks by its configuration: PIP_INDEX_URL, pip.conf, or the default."""
    from unearth import PackageFinder
    from unearth.fetchers import PyPIClient

    settings = _pip_settings()
    urls = [url for name in ("index-url", "extra-index-url") for url in settings.get(name, "").split()]
    remote = [url for url in urls if url.startswith("http")]
    session: Any = PyPIClient(verify=settings.get("cert", True), follow_redirects=True)
    return PackageFinder(
        session=session,
        index_urls=remote,
        ignore_compatibility=True,
    )


@functools.cache
def _pip_settings() -> dict[str, str]:
    """Return pip's configuration: its files, overridden by the environment."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(global|install|download|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    ranks = ("global", "install", "download", ":env:")
    return {name: value for _, name, value in sorted(found, key=lambda entry: ranks.index(entry[0]))}


@contextmanager
def _wheel(url: str, folder: Path) -> Iterator[zipfile.ZipFile]:
    import requests
    from remotezip import RangeNotSupported, RemoteZip

    session = requests.Session()
    session.verify = _pip_settings().get("cert", True)
    try:
        archive: zipfile.ZipFile = RemoteZip(url, session=session)
    except RangeNotSupported:
        with _downloaded(url, folder) as file, zipfile.ZipFile(file) as whole:
            yield whole
        return
    with archive:
        yield archive


@contextmanager
def _downloaded(url: str, folder: Path) -> Iterator[IO[bytes]]:
    """Yield a whole file, kept in memory as long as it is read."""
    import requests

    with tempfile.TemporaryFile(dir=folder) as file:
        with requests.get(url, stream=True, timeout=60, verify=_pip_settings().get("cert", True)) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
        file.seek(0)
        yield file


def _unpack(url: str, folder: Path, package: str) -> list[str]:
    """Return all Python files of ``package`` from an archive of sources."""
    names = []
    with _downloaded(url, folder) as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and _counts(name, package):
                content = archive.extractfile(member)
                assert content is not None
                _write(folder / name, content.read())
                names.append(name)
    return names


def _counts(name: str, package: str) -> bool:
    return name.endswith((".py", COMPILED)) and name.startswith(package) and ".." not in name


def _identifiers(module: bytes) -> bytes:
    """Return the texts of a compiled module by which Python could know its functions, sorted, a line each."""
    return b"\n".join(sorted(set(_IDENTIFIER.findall(module))))


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically: others may read it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def main() -> int:
    """Print the releases that the index has and ci/matrix.toml lacks, newer than its oldest."""
    from packaging.version import Version

    from ci import matrix

    for project in ("vllm", "vllm-ascend", "ray"):
        known = [Version(version) for version in matrix.read().versions(project)]
        new = sorted(version for version in map(Version, released(project)) if version > min(known))
        missing = [str(version) for version in new if version not in known and not version.is_devrelease]
        print(f"{project}: {', '.join(missing) or 'none'} not in {matrix.PATH.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
