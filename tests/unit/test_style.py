"""Rules of CONTRIBUTING.md that ruff does not hold: reasons of broad handlers, first words of docstrings, widths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "vllm_ray_ascend").rglob("*.py")), *sorted((ROOT / "softnpu" / "src").rglob("*.py"))]
WIDTH = 100
_BROAD = re.compile(r"^\s*except (?:Base)?Exception\b[^#]*:(?P<comment>.*)")
_NOT_WRAPPED = re.compile(r"\s*(?:\||#|!?\[[^\]]*\]\([^)]*\)\S*$|`[^`]*`$|<!--)|    ")
"""Tables, headings, an image or a link alone, a quotation alone, a comment, code."""
_FREE = re.compile(r"CHANGELOG\.md|benchmarks/results/.*")
"""One line an entry; written by programs."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split() if not _FREE.fullmatch(name) and (ROOT / name).exists()]


def handlers_without_reason(source: str) -> list[int]:
    """Return the lines of handlers of Exception or BaseException that say nothing about why they are so broad."""
    found = ((number, _BROAD.match(line)) for number, line in enumerate(source.splitlines(), 1))
    return [number for number, match in found if match and not match["comment"].replace("# noqa: BLE001", "").strip()]


def nominal_docstrings(source: str) -> Iterator[int]:
    """Yield the lines of functions whose docstring begins with a noun or "Whether", which D401 lets pass."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or any(
            "property" in ast.unparse(each) for each in node.decorator_list
        ):
            continue
        if re.match(r"(?:Whether|What|Who|Where|When|Why|The|An?) ", ast.get_docstring(node) or ""):
            yield node.lineno


def wide_lines(text: str) -> Iterator[int]:
    """Yield the lines of prose that are wider than WIDTH."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if len(line) > WIDTH and not in_code and not _NOT_WRAPPED.match(line):
            yield number


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_broad_handlers_have_a_reason(path: Path) -> None:
    assert handlers_without_reason(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    assert list(nominal_docstrings(path.read_text())) == []


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_prose_is_wrapped(path: Path) -> None:
    assert list(wide_lines(path.read_text())) == []


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("    except Exception:", True),
        ("    except BaseException as error:", True),
        ("    except Exception as error:  # noqa: BLE001", True),
        ("    except Exception as error:  # noqa: BLE001  the caller raises it", False),
        ("    except Exception:  # whatever it is, the next call is needed", False),
        ("    except ValueError:", False),
    ],
)
def test_handlers_without_reason_are_found(line: str, broken: bool) -> None:
    assert handlers_without_reason(f"try:\n    call()\n{line}\n    raise\n") == ([3] if broken else [])


def test_nominal_docstrings_are_found() -> None:
    functions = (
        'def f():\n    """Whether it is."""',
        '@property\ndef g():\n    """The name."""',
        'def h():\n    """Return it."""',
    )
    assert list(nominal_docstrings("\n".join(functions))) == [1]


def test_wide_lines_are_found() -> None:
    words = "word " * 21
    assert list(wide_lines(f"{words}\n| {words} |\n    {words}\n```\n{words}\n```\n- {words}")) == [1, 7]
