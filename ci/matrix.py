"""ci/matrix.toml, read: the releases that are supported, and what was run with each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
"""Python 3.10 has its reader of TOML in pip alone."""
PATH = Path(__file__).with_name("matrix.toml")
RUNS = ("contract", "unit", "basic", "softnpu", "e2e")


@dataclass(frozen=True)
class Release:
    """One line of the matrix."""

    version: str
    run: tuple[str, ...]
    """What was run with it and passed, of RUNS."""
    made_for: str = ""
    """The release of vLLM that a vllm-ascend is made for."""
    pins: tuple[str, ...] = ()
    """Versions of other packages, ``name==version``, that `ci.run_release` installs with it in place of ours."""
    note: str = ""


@dataclass(frozen=True)
class Matrix:
    """All lines, by project."""

    projects: Mapping[str, tuple[Release, ...]]

    def versions(self, project: str) -> list[str]:
        """Return the versions of ``project``, in the order of the file."""
        return [release.version for release in self.projects[project]]

    def release(self, project: str, version: str) -> Release:
        """Return the line of one release. Raises ValueError where there is none."""
        for release in self.projects.get(project, ()):
            if release.version == version:
                return release
        known = ", ".join(self.versions(project)) if project in self.projects else "none: " + ", ".join(self.projects)
        raise ValueError(f"{PATH.name} has no line for {project} {version} (it has {known})")


def toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file."""
    with path.open("rb") as file:
        tables: dict[str, Any] = _TOML.load(file)
    return tables


def read(path: Path = PATH) -> Matrix:
    """Return the matrix. Raises ValueError for a line with an unknown key or value."""
    tables = toml(path)
    return Matrix({project: tuple(_release(project, line) for line in lines) for project, lines in tables.items()})


def _release(project: str, line: Mapping[str, Any]) -> Release:
    unknown = set(line) - {"version", "run", "with", "pins", "note"}
    run = tuple(line.get("run", ()))
    if unknown or "version" not in line or set(run) - set(RUNS):
        raise ValueError(
            f"{PATH.name}: {project}: {dict(line)}: give version, run (of {', '.join(RUNS)}), with, pins, note"
        )
    return Release(
        version=str(line["version"]),
        run=run,
        made_for=str(line.get("with", "")),
        pins=tuple(line.get("pins", ())),
        note=str(line.get("note", "")),
    )
