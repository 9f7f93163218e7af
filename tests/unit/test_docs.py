"""Documentation: what it quotes is in the sources, its tables are those of the code, what it names is there."""

from __future__ import annotations

import ast
import importlib.util
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ci.docs import PAGES, TABLES, filled, relinked, settings_table, suites_table, with_further
from ci.suites import SUITES
from vllm_ray_ascend.accelerators import npu_codes
from vllm_ray_ascend.settings import Settings, variable_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^### `(?P<text>[^\n]+)`\n\nFrom (?P<rest>(?:.+\n)+)\n\*\*Do:\*\* \S", re.MULTILINE)
PACKAGES = {
    "this package": ("vllm_ray_ascend",),
    "vLLM": ("vllm",),
    "vLLM and vllm-ascend": ("vllm_ascend",),
    "vllm-ascend": ("vllm_ascend",),
    "Ray": ("ray",),
    "Ray's autoscaler": ("ray",),
    "PyTorch": ("torch/__init__.py",),
    "torch_npu": ("torch_npu/lib/libtorch_npu.so",),
}
CODES = ("CANN's runtime", "HCCL")
LEAST = 9
"""Shorter pieces of a text are in any file."""


def entries() -> list[tuple[str, str]]:
    """Texts of the troubleshooting page and where they come from."""
    return [
        (found["text"], origin_of(found["rest"])) for found in ENTRY.finditer((DOCS / "troubleshooting.md").read_text())
    ]


def origin_of(words: str) -> str:
    known = sorted((*PACKAGES, *CODES, "the system's loader"), key=len, reverse=True)
    return next((name for name in known if words.startswith(name)), words)


@cache
def strings_of(path: Path) -> str:
    """All that a Python file says, with the pieces of each text joined as Python joins them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    return "\n".join(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def said_by(place: str, pieces: list[str]) -> bool:
    """Whether one file of the package ``place`` says all the ``pieces``."""
    if place == "vllm_ray_ascend":
        files: Iterator[Path] = (ROOT / place).rglob("*.py")
    else:
        package, _, rest = place.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            pytest.skip(f"{package} is not installed")
        path = Path(found.origin).parent / rest
        if path.suffix == ".so":
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return all(content.find(piece.encode()) >= 0 for piece in pieces)
        files = path.rglob("*.py") if path.is_dir() else iter([path])
    first = max(pieces, key=len).encode()
    for path in files:
        raw = path.read_bytes()
        # A long text is written in several pieces: its words all stand there, if not side by side.
        if all(word in raw for word in first.split()) and all(piece in strings_of(path) for piece in pieces):
            return True
    return False


DIFFERS = re.compile(
    r"\.\.\.|\[[^\]]*\)?\]?|\b\d[\d.,]*\b|'[^']*'"  # dots, ranges, numbers, what stands in quotes
    r"|\b(?:ASCEND|RAY|VLLM|HCCL)_[A-Z0-9_]+(?:=\S*)?|\b\w+Error:"  # variables with their values, names of errors
    r"|vLLM's platform|\b(?:NPUs?|GPUs?|ranks?|model|hccl\w*|sample_tokens|execute_model|ray_ascend|platform)\b"
)


def pieces_of(text: str) -> list[str]:
    """A quoted text without what differs from case to case."""
    return [kept for part in DIFFERS.split(text) if len(kept := part.strip(" ,:;=()")) >= LEAST]


def test_there_are_enough_entries() -> None:
    assert len(entries()) >= 30
    assert len(entries()) == (DOCS / "troubleshooting.md").read_text().count("\n### "), (
        "an entry is not of the usual form"
    )
    texts = [text for text, _ in entries()]
    assert len(set(texts)) == len(texts)
    origins = {origin for _, origin in entries()}
    assert {"this package", "vLLM", "vllm-ascend", "Ray", "torch_npu", "HCCL", "CANN's runtime"} <= origins
    assert origins <= {*PACKAGES, *CODES, "the system's loader"}


@pytest.mark.parametrize(
    ("text", "origin"), [each for each in entries() if each[1] in PACKAGES], ids=lambda value: str(value)[:40]
)
def test_what_is_quoted_is_what_is_said(text: str, origin: str) -> None:
    pieces = pieces_of(text)
    assert pieces, text
    assert any(said_by(place, pieces) for place in PACKAGES[origin]), f"{origin} does not say {pieces}"


@pytest.mark.parametrize("text", [text for text, origin in entries() if origin in CODES])
def test_codes_are_known(text: str) -> None:
    code = text.rsplit(maxsplit=1)[-1]
    assert code in npu_codes.NUMBERED or int(code) in npu_codes.RUNTIME


def test_the_checks_can_fail() -> None:
    assert not said_by("vllm_ray_ascend", ["no file of this package says such a thing, this one not!"])
    assert pieces_of("The engine needs 8 NPUs ..., the Ray cluster has 4") == [
        "The engine needs",
        "the Ray cluster has",
    ]


def test_errors_md_quotes_what_is_said() -> None:
    """Each first cell of its tables, up to the first thing that differs from case to case."""
    quoted = re.findall(r"^\| `([^`]+)`", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30
    ours = "\n".join(strings_of(path) for path in (ROOT / "vllm_ray_ascend").rglob("*.py"))
    ours += "\n".join(path.read_text() for path in (ROOT / "vllm_ray_ascend").rglob("*.cpp"))
    missing = {text: [piece for piece in pieces_of(text) if piece not in ours] for text in quoted}
    assert not {text: pieces for text, pieces in missing.items() if pieces}


def test_tables_hold_all_there_is() -> None:
    table = settings_table()
    assert all(f"`{variable_of(field)}`" in table for field in Settings.__struct_fields__)
    assert all(f"`{name}`" in suites_table() for name in SUITES)
    marked = set(re.findall(r"<!-- table: (\S+) -->", "".join(path.read_text() for path in DOCS.glob("*.md"))))
    assert marked == set(TABLES)
    assert "<!-- table" not in filled((DOCS / "configuration.md").read_text())
    with pytest.raises(KeyError, match="nonsense"):
        filled("<!-- table: nonsense -->")


def test_links_out_of_the_documentation() -> None:
    assert (
        relinked("[benchmarks/README.md](../benchmarks/README.md)", "x.md") == "[benchmarks/README.md](benchmarks.md)"
    )
    assert relinked("see [tests](../tests/conftest.py)", "x.md") == "see tests (`tests/conftest.py`)"
    assert relinked("[NPUs](../docs/software-npu.md#nodes)", "benchmarks.md") == "[NPUs](software-npu.md#nodes)"
    assert relinked("[gone](nowhere.md)", "x.md") == "[gone](nowhere.md)"
    assert all((ROOT / source).is_file() for source in PAGES.values())


def test_pages_that_the_navigation_lacks_have_a_place() -> None:
    nav: list[dict[str, Any]] = [{"Running it": [{"Graphs": "graphs.md"}]}, {"Working on it": ["ci.md"]}]
    assert with_further(nav, ["graphs.md", "ci.md"]) == nav
    assert with_further(nav, ["graphs.md", "new.md", "transport.md"]) == [
        {"Running it": [{"Graphs": "graphs.md"}, "transport.md"]},
        {"Working on it": ["ci.md"]},
        {"Further pages": ["new.md"]},
    ]


def test_switches_that_are_named_are_there() -> None:
    texts = {path: path.read_text() for path in [*DOCS.glob("*.md"), ROOT / "README.md", *DOCS.glob("kuberay/*.yaml")]}
    known = {variable_of(field) for field in Settings.__struct_fields__}
    for path, text in texts.items():
        named = set(re.findall(r"VLLM_RAY_ASCEND(?:_[A-Z0-9]+)*\b(?![_*])", text))
        assert named <= known, f"{path.name} names {named - known}"
