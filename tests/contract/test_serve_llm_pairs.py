"""docs/ray-serve-llm.md says with which vLLM each Ray's Serve LLM can be imported; the released sources decide."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ci.matrix import read
from ci.releases import Sources, fetch

pytestmark = pytest.mark.unit

PAGE = Path(__file__).resolve().parents[2] / "docs/ray-serve-llm.md"
SERVE = "ray/llm/_internal/serve"
IMPORTERS = tuple(
    f"{SERVE}/{name}.py"
    for name in ("core/configs/openai_api_models", "engines/vllm/vllm_engine", "engines/vllm/vllm_models")
)
"""What `import ray.serve.llm` reads of Ray's and imports vLLM in turn."""
ROW = re.compile(r"^\| (2\.\d+)(?: to (2\.\d+))? \| (0\.\d+)(?: to (0\.\d+))? \|", re.MULTILINE)
Name = tuple[str, str]


def test_the_page_names_the_releases_that_fit() -> None:
    matrix = read()
    rays = [version for version in matrix.versions("ray") if minor(version) >= 56]
    needed = {ray: set(imported(fetch("ray", ray, IMPORTERS))) for ray in rays}
    assert all(needed.values())
    modules = {module for names in needed.values() for module, _ in names}
    documented = pairs_of(PAGE.read_text())
    for vllm in matrix.versions("vllm"):
        sources = fetch("vllm", vllm, [file for module in modules for file in files_of(module)])
        for ray, names in needed.items():
            missing = sorted(".".join(name) for name in names if not has(sources, name))
            assert ((minor(ray), minor(vllm)) in documented) == (not missing), (ray, vllm, missing)


def minor(version: str) -> int:
    return int(version.split(".")[1])


def pairs_of(text: str) -> set[tuple[int, int]]:
    """Return the pairs of Ray's and vLLM's minor numbers in the table of the page."""
    rows = [[minor(version) if version else 0 for version in row] for row in ROW.findall(text)]
    return {
        (ray, vllm)
        for first_ray, last_ray, first_vllm, last_vllm in rows
        for ray in range(first_ray, (last_ray or first_ray) + 1)
        for vllm in range(first_vllm, (last_vllm or first_vllm) + 1)
    }


def imported(ray: Sources) -> Iterator[Name]:
    """Yield module and name of what the importers take from vLLM when they are imported."""
    for file in IMPORTERS:
        for statement in executed(ast.parse(ray.text(file) or "").body):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("vllm."):
                yield from ((str(statement.module), alias.name) for alias in statement.names)


def executed(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that an import executes: none under TYPE_CHECKING, in functions or after an error."""
    for statement in statements:
        yield statement
        if isinstance(statement, ast.Try):
            yield from executed(statement.body)


def files_of(module: str) -> tuple[str, str]:
    path = module.replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def has(vllm: Sources, name: Name) -> bool:
    """Return whether this vLLM has the name in this module."""
    module, attribute = name
    texts = [vllm.text(file) or "" for file in files_of(module)]
    return any(re.search(rf"\b{attribute}\b", text) for text in texts)
