"""The developers' pages name files and objects that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
BASES = (ROOT, ROOT / "vllm_ray_ascend")
"""Where a path may begin."""
PAGES = [
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "accelerators",
            "architecture",
            "compiled-graph",
            "direct-transport",
            "failure-detection",
            "results",
            "transport",
        )
    ),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",
]
_PATH = re.compile(r"`([a-z][\w.-]*/[\w./-]+\.(?:py|md|toml|cpp|json))`")
_CALL = re.compile(r"`(?:[\w.]+\.)?([a-z_]{4,})\(")
_IN_FILE = re.compile(r"`([\w.]+)(?:\(\))?` of `([\w/]+\.py)`")
_MAP_ROW = re.compile(r"^\| [^|]+ \| `([^`|]+)` \| `([\w.]+)`", re.MULTILINE)
_OF_TORCH = {"state_dict"}


def find_file(path: str) -> Path | None:
    """Return the file of a path from the repository's root, or from vllm_ray_ascend/."""
    return next((base / path for base in BASES if (base / path).exists()), None)


@cache
def sources() -> str:
    """Return all Python sources of the repository."""
    folders = ("vllm_ray_ascend", "softnpu", "benchmarks", "tests", "ci")
    return "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def defines(path: str, name: str) -> bool:
    """Return whether the file defines a function, a class or a variable of this name."""
    file, last = find_file(path), re.escape(name.rpartition(".")[2])
    pattern = rf"^\s*(?:(?:async )?def|class) {last}\b|^\s*{last}\b(?::[^=]+)? = |^\s*{last}: "
    return file is not None and re.search(pattern, file.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = text.partition("### Moved")[0]  # old names stand there
    paths = [path for path in _PATH.findall(text) if "NAME" not in path]
    assert [path for path in paths if find_file(path) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_called_names_exist(page: Path) -> None:
    """Each call in a code span is a word of our sources, be it upstream's name that they use."""
    names = set(_CALL.findall(page.read_text())) - _OF_TORCH
    assert [name for name in names if not re.search(rf"\b{name}\b", sources())] == []


def test_map_of_the_architecture_page() -> None:
    rows = _MAP_ROW.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(rows) > 10
    assert [row for row in rows if not defines(*row)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_a_file_are_defined_there(page: Path) -> None:
    """`name` of `folder/file.py`."""
    text = page.read_text().partition("### Moved")[0]
    rows = [(path, name) for name, path in _IN_FILE.findall(text.replace("\n", " "))]
    assert [row for row in rows if not defines(*row)] == []
