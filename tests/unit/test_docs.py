"""Documentation: what it quotes is in the sources, its tables are those of the code, what it names exists."""

from __future__ import annotations

import importlib.util
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from ci.docs import PAGES, TABLES, compatibility_table, fill_tables, rewrite_links, settings_table, suites_table
from ci.matrix import read
from ci.suites import SUITES
from tests.quoted_texts import is_said_in, pieces_of, strings_of
from vllm_ray_ascend.accelerators import npu_codes
from vllm_ray_ascend.settings import Settings, variable_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^### `(?P<text>[^\n]+)`\n\nFrom (?P<rest>(?:.+\n)+)\n\*\*Do:\*\* \S", re.MULTILINE)
PACKAGES = {
    "vLLM": ("vllm",),
    "vLLM and vllm-ascend": ("vllm_ascend",),
    "vllm-ascend": ("vllm_ascend",),
    "Ray": ("ray",),
    "Ray's autoscaler": ("ray",),
    "PyTorch": ("torch/__init__.py",),
    "torch_npu": ("torch_npu/lib/libtorch_npu.so",),
}
SOFTWARE_NPU = "the software NPU"
CODES = ("CANN's runtime", "HCCL")
ORIGINS = {*PACKAGES, *CODES, SOFTWARE_NPU, "the system's loader"}


def entries() -> list[tuple[str, str]]:
    """Return the texts of other software on the page of errors, and where they come from."""
    return [(found["text"], origin_of(found["rest"])) for found in ENTRY.finditer((DOCS / "errors.md").read_text())]


def origin_of(words: str) -> str:
    return next((name for name in sorted(ORIGINS, key=len, reverse=True) if words.startswith(name)), words)


def is_said_by(place: str, pieces: list[str]) -> bool:
    """Return whether one file of the installed package ``place``, or the file of it that is named, has the pieces."""
    package, _, rest = place.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    path = Path(found.origin).parent / rest
    if path.suffix == ".so":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(piece.encode()) >= 0 for piece in pieces)
    files: Iterable[Path] = path.rglob("*.py") if path.is_dir() else [path]
    return is_said_in(files, pieces)


def test_there_are_enough_entries() -> None:
    assert len(entries()) >= 50
    assert len(entries()) == (DOCS / "errors.md").read_text().count("\n### `"), "an entry is not of the usual form"
    texts = [text for text, _ in entries()]
    assert len(set(texts)) == len(texts)
    assert {origin for _, origin in entries()} == ORIGINS


@pytest.mark.parametrize(
    ("text", "origin"), [each for each in entries() if each[1] in PACKAGES], ids=lambda value: str(value)[:40]
)
def test_what_is_quoted_is_what_is_said(text: str, origin: str) -> None:
    pieces = pieces_of(text)
    assert pieces, text
    assert any(is_said_by(place, pieces) for place in PACKAGES[origin]), f"{origin} does not say {pieces}"


@pytest.mark.parametrize("text", [text for text, origin in entries() if origin in CODES])
def test_codes_are_known(text: str) -> None:
    code = text.rsplit(maxsplit=1)[-1]
    assert code in npu_codes.NUMBERED or int(code) in npu_codes.RUNTIME


def test_texts_of_the_software_npu() -> None:
    sources = ROOT / "softnpu" / "src" / "softnpu"
    said = "\n".join(path.read_text() for suffix in ("py", "cpp") for path in sources.rglob(f"*.{suffix}"))
    texts = [text for text, origin in entries() if origin == SOFTWARE_NPU]
    assert texts
    assert not {
        text: missing for text in texts if (missing := [piece for piece in pieces_of(text) if piece not in said])
    }


def test_information_in_the_log_is_quoted() -> None:
    section = (DOCS / "errors.md").read_text().partition("\n## Information in the log\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    ours = "\n".join(strings_of(path) for path in (ROOT / "vllm_ray_ascend").rglob("*.py"))
    assert len(lines) >= 5
    assert not {
        line: missing for line in lines if (missing := [piece for piece in pieces_of(line) if piece not in ours])
    }


def test_the_checks_can_fail() -> None:
    assert not is_said_by("vllm_ascend", ["no file of this package says such a thing, not one!"])
    assert pieces_of("The engine needs 8 NPUs ..., the Ray cluster has 4") == [
        "The engine needs",
        "the Ray cluster has",
    ]


def test_tables_hold_all_there_is() -> None:
    table = settings_table()
    assert all(f"`{variable_of(field)}`" in table for field in Settings.__struct_fields__)
    assert all(f"`{name}`" in suites_table() for name in SUITES)
    assert len(re.findall("^### ", compatibility_table(read()), re.MULTILINE)) == len(read().projects)
    marked = set(re.findall(r"<!-- table: (\S+) -->", "".join(path.read_text() for path in DOCS.glob("*.md"))))
    assert marked == set(TABLES)
    assert "<!-- table" not in fill_tables((DOCS / "configuration.md").read_text())
    with pytest.raises(KeyError, match="nonsense"):
        fill_tables("<!-- table: nonsense -->")


def test_links_out_of_the_documentation() -> None:
    assert (
        rewrite_links("[benchmarks/README.md](../benchmarks/README.md)", "x.md")
        == "[benchmarks/README.md](benchmarks.md)"
    )
    assert rewrite_links("see [tests](../tests/conftest.py)", "x.md") == "see tests (`tests/conftest.py`)"
    assert rewrite_links("[NPUs](../docs/software-npu.md#nodes)", "benchmarks.md") == "[NPUs](software-npu.md#nodes)"
    assert rewrite_links("[gone](nowhere.md)", "x.md") == "[gone](nowhere.md)"
    assert all((ROOT / source).is_file() for source in PAGES.values())


def test_the_navigation_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    records = {page for page in pages if page.startswith("decisions/0")}
    assert sorted(named) == sorted((pages | set(PAGES)) - records)


def test_switches_that_are_named_are_there() -> None:
    texts = {path: path.read_text() for path in [*DOCS.glob("*.md"), ROOT / "README.md", *DOCS.glob("kuberay/*.yaml")]}
    known = {variable_of(field) for field in Settings.__struct_fields__}
    for path, text in texts.items():
        named = set(re.findall(r"VLLM_RAY_ASCEND(?:_[A-Z0-9]+)*\b(?![_*])", text))
        assert named <= known, f"{path.name} names {named - known}"
