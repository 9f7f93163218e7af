"""Are the patches in patches/ true of every supported release? `python -m ci.check_patches [PROJECT ...]`

A patch has to apply to each release in its range, without fuzz, and to no other; where it is upstream already, it is to
be dropped. Every patch says which code of ours does the same at run time, or why none does; and every function in
compat/ that stands in for upstream's has a patch.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from ci import matrix
from ci.contract import code
from ci.matrix import toml
from ci.releases import ReleaseError, Sources, fetch

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
HEADERS = ("Subject", "Description", "Author", "Origin", "Bug", "Forwarded")
FORWARDED = ("no", "not-needed")
TOOLS = ("import_hook", "versions", "ray_state")
"""Modules of compat/ that stand in for nothing of upstream's: they read, or help others to replace."""
_THREADS = 8


@dataclass(frozen=True)
class Patch:
    """One entry of series.toml."""

    file: str
    releases: str
    test: str
    shows: str
    """Words of what the defect looks like to its test."""
    shim: str
    """What does the same at run time: ``module:name`` in our code."""

    @property
    def project(self) -> str:
        """Whose source it changes."""
        return self.file.partition("/")[0]

    @property
    def text(self) -> str:
        """The whole of it."""
        return (PATCHES / self.file).read_text()

    def is_for(self, version: str) -> bool:
        """Return whether a release has the defect."""
        return SpecifierSet(self.releases).contains(version, prereleases=True)

    def touches(self) -> list[str]:
        """Return files of upstream that it changes."""
        return re.findall(r"^--- a/(\S+)$", self.text, re.MULTILINE)


def series() -> list[Patch]:
    """Return all patches of series.toml. Raises TypeError for an entry that says something unknown."""
    return [Patch(**entry) for entry in toml(PATCHES / "series.toml")["patch"]]


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong; the exit code."""
    wanted = [patch for patch in series() if not arguments or patch.project in arguments]
    wrong = [*faults_of_series(), *(fault for patch in wanted for fault in faults_of_entry(patch))]
    releases = [
        (project, version)
        for project, lines in matrix.read().projects.items()
        for version in (line.version for line in lines)
        if any(patch.project == project for patch in wanted)
    ]
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for faults in pool.map(lambda release: list(faults_in(release[0], release[1], wanted)), releases):
                wrong += faults
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 2
    for fault in wrong:
        print(fault)
    print(f"{len(wanted)} patches against {len(releases)} releases: {len(wrong)} faults")
    return 1 if wrong else 0


def faults_in(project: str, version: str, patches: Sequence[Patch]) -> Iterator[str]:
    """Yield what is wrong with the patches of one project in one of its releases."""
    own = [patch for patch in patches if patch.project == project]
    sources = fetch(project, version, {name for patch in own for name in patch.touches()})
    for patch in own:
        applied = applies(patch, sources)
        where = f"{patch.file}: {project} {version}"
        if patch.is_for(version) and not applied:
            upstream = applies(patch, sources, reverse=True)
            what = "has it already: end its range before it" if upstream else "is in its range, but it does not apply"
            yield f"{where} {what}"
        elif applied and not patch.is_for(version):
            yield f"{where} is out of its range ({patch.releases}), but it applies: widen the range"


def applies(patch: Patch, sources: Sources, *, reverse: bool = False) -> bool:
    """Return whether it applies to a release; with offsets, without fuzz."""
    if any(name not in sources.names for name in patch.touches()):
        return False
    with tempfile.TemporaryDirectory() as folder:
        _copy(sources, patch.touches(), Path(folder))
        return _git_apply(patch, Path(folder), "--check", *(["--reverse"] if reverse else [])) == ""


def apply(patch: Patch, folder: Path) -> None:
    """Change the files in ``folder``. Raises ValueError with git's words where it does not apply."""
    if git_error := _git_apply(patch, folder):
        raise ValueError(f"{patch.file}: {git_error}")


def _copy(sources: Sources, names: Sequence[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(sources.text(name) or "")


def _git_apply(patch: Patch, folder: Path, *options: str) -> str:
    """Return git's error output, empty on success. Inside of a repository git would skip the files."""
    ended = subprocess.run(
        ["git", "apply", "-p1", *options, str(PATCHES / patch.file)],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stderr if ended.returncode else ""


def faults_of_entry(patch: Patch) -> Iterator[str]:
    """Yield what is wrong with an entry and its file's header."""
    if not (PATCHES / patch.file).is_file():
        yield f"{patch.file}: no such file"
        return
    header = patch.text.partition("\n---\n")[0]
    fields = dict(re.findall(r"^([A-Z][\w-]+): (.+)$", header, re.MULTILINE))
    if lacking := [name for name in HEADERS if not fields.get(name)]:
        yield f"{patch.file}: its header lacks {', '.join(lacking)}"
    if fields.get("Forwarded") not in FORWARDED and "://" not in fields.get("Forwarded", ""):
        yield f"{patch.file}: Forwarded says {fields.get('Forwarded')}: {', '.join(FORWARDED)} or an address"
    if not is_ours(patch.shim):
        yield f"{patch.file}: its shim {patch.shim} is not in our code"
    if not any(patch.is_for(version) for version in matrix.read().versions(patch.project)):
        yield f"{patch.file}: no supported release of {patch.project} is in its range {patch.releases}: remove it"


def faults_of_series() -> Iterator[str]:
    """Yield patches without an entry, duplicate entries, and functions of compat/ without a patch."""
    entries = [patch.file for patch in series()]
    files = {path.relative_to(PATCHES).as_posix() for path in PATCHES.rglob("*.patch")}
    for name in sorted(files - set(entries)):
        yield f"{name}: not in series.toml"
    for name in sorted({name for name in entries if entries.count(name) > 1}):
        yield f"{name}: twice in series.toml"
    shims = {patch.shim for patch in series()}
    for shim in stand_ins():
        if shim not in shims:
            yield f"{shim} stands in for upstream's code, but no patch in series.toml names it as its shim"


def stand_ins() -> list[str]:
    """Return the functions of compat/ that change what upstream does: those called with a module, or for an effect."""
    found = []
    for path in sorted((ROOT / "vllm_ray_ascend" / "compat").glob("*.py")):
        if path.stem in TOOLS:
            continue
        for node in code.parse(path.read_text()).body:
            # What answers a question says how things are; what answers nothing changes them.
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.returns is None:
                continue
            if ast.unparse(node.returns) == "None":
                found.append(f"vllm_ray_ascend.compat.{path.stem}:{node.name}")
    return found


def is_ours(shim: str) -> bool:
    """Return whether ``module:name`` is in our code."""
    module, _, name = shim.partition(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path.is_file() and bool(name) and code.find(code.parse(path.read_text()), name) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
