"""Codes of our messages (VRA-101): every error and warning has one of its own, and docs/errors.md explains each."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.quoted_texts import pieces_of, strings_of
from vllm_ray_ascend import errors

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_ray_ascend"
PAGE = ROOT / "docs" / "errors.md"
CODE = re.compile(r"VRA-\d{3}(?P<rest>$|: )")
LOG_METHODS = {"warning", "error", "exception", "critical"}
OUR_ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.VllmRayAscendError)
}
ENTRY = re.compile(
    r"^### (?P<code>VRA-\d{3})\n\n`(?P<text>[^`\n]+)`\n\n(?P<reason>(?:[^#*\n].*\n+)*)\*\*Do:\*\* (?P<remedy>\S)",
    re.MULTILINE,
)


class Site(NamedTuple):
    """A place in the sources where a code stands: a string of its own, or the beginning of a text."""

    code: str
    place: str
    text: str
    """The literal parts of the message, one a line; empty where the text is not written beside the code."""


@cache
def trees() -> dict[str, ast.Module]:
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def sites_of(tree: ast.Module, name: str) -> Iterator[Site]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        if not (found := CODE.match(node.value)):
            continue
        parent = parents[node]
        message: ast.AST | None = parent if isinstance(parent, ast.JoinedStr) else node
        if not found["rest"]:  # the code alone: the message is the argument or the element after it
            siblings = getattr(parent, "args", None) or getattr(parent, "elts", [])
            message = next(iter(siblings[siblings.index(node) + 1 :]), None)
        yield Site(node.value[:7], f"{name}:{node.lineno}", literals_of(message))


def literals_of(message: ast.AST | None) -> str:
    if isinstance(message, ast.JoinedStr):
        return "\n".join(filter(None, map(literals_of, message.values)))
    if isinstance(message, ast.BinOp):
        return f"{literals_of(message.left)}\n{literals_of(message.right)}"
    return message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else ""


@cache
def sites() -> tuple[Site, ...]:
    return tuple(site for name, tree in trees().items() for site in sites_of(tree, name))


def errors_without_code(tree: ast.Module) -> Iterator[int]:
    """Yield the line of each construction of one of our errors whose first argument is not a literal code.

    A variable will do where it is unpacked from a function of the same file all of whose results begin with one.
    """
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    variables = {
        target.elts[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name)
        if returns_codes(functions.get(ast.unparse(node.value.func).rpartition(".")[2]))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in OUR_ERRORS:
            code = node.args[0] if node.args else None
            is_literal = isinstance(code, ast.Constant) and re.fullmatch(r"VRA-\d{3}", str(code.value))
            if not is_literal and not (isinstance(code, ast.Name) and code.id in variables):
                yield node.lineno


def returns_codes(function: ast.FunctionDef | None) -> bool:
    results = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)] if function else []
    return bool(results) and all(
        isinstance(result, ast.Tuple)
        and isinstance(result.elts[0], ast.Constant)
        and CODE.fullmatch(str(result.elts[0].value))
        for result in results
    )


def log_lines_without_code(tree: ast.Module) -> Iterator[int]:
    """Yield the line of each warning or error that is logged without a code. "%s" alone passes on a finished text."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS):
            continue
        if not re.fullmatch(r"_?log(ger)?", ast.unparse(node.func.value)):
            continue
        text = node.args[0]
        if not (isinstance(text, ast.Constant) and re.match(r"VRA-\d{3}: |%s$", str(text.value))):
            yield node.lineno


def entries() -> dict[str, re.Match[str]]:
    return {found["code"]: found for found in ENTRY.finditer(PAGE.read_text())}


@pytest.mark.parametrize("name", trees())
def test_errors_and_warnings_have_codes(name: str) -> None:
    assert list(errors_without_code(trees()[name])) == []
    assert list(log_lines_without_code(trees()[name])) == []


def test_one_code_is_one_message() -> None:
    by_code: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites():
        by_code[site.code].append(site)
    shared = {code: each for code, each in by_code.items() if len({site.text or site.place for site in each}) > 1}
    assert not shared


def test_every_code_has_an_entry_and_every_entry_a_source() -> None:
    documented = re.findall(r"^### (VRA-\d{3})$", PAGE.read_text(), re.MULTILINE)
    assert documented == sorted({site.code for site in sites()})
    assert list(entries()) == documented, "an entry is not of the usual form: code, text, reason, **Do:**"


def test_entries_are_in_the_section_of_their_hundred() -> None:
    section = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:8]
        elif line.startswith("### VRA-"):
            assert line[4:9] == section


def test_entries_quote_their_message() -> None:
    """All of a text is in our sources, and some of it beside its code where the message is written there."""
    anywhere = "\n".join(strings_of(path) for path in PACKAGE.rglob("*.py"))
    beside = {site.code: site.text for site in sites()}
    for code, found in entries().items():
        pieces, literals = pieces_of(found["text"]), beside.get(code, "")
        assert [piece for piece in pieces if piece not in anywhere] == [], code
        assert not pieces_of(literals) or any(piece in literals for piece in pieces), code


def test_other_pages_name_codes_that_exist() -> None:
    known = {site.code for site in sites()}
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        assert set(re.findall(r"VRA-\d{3}\b", path.read_text())) <= known, path.name


def test_the_checks_can_fail() -> None:
    tree = ast.parse(
        """
def explain(error):
    return "VRA-901", f"because of {error}"
def act(logger, error):
    logger.warning("no code")
    logger.error("VRA-902: %s", error)
    code, reason = explain(error)
    if error:
        raise PlacementError(code, reason)
    raise PlacementError(other, f"VRA is no code")
    raise PlacementError("VRA-903", f"it was {error} all along")
"""
    )
    assert list(log_lines_without_code(tree)) == [5]
    assert list(errors_without_code(tree)) == [10]
    assert {site.code: site.text for site in sites_of(tree, "x")} == {
        "VRA-901": "because of ",
        "VRA-902": "VRA-902: %s",
        "VRA-903": "it was \n all along",
    }
