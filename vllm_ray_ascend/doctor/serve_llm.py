"""What Ray Serve LLM imports of vLLM, against what the installed vLLM has: read, not imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

SERVE = "llm/_internal/serve"
IMPORTERS = tuple(
    f"{SERVE}/{name}.py"
    for name in ("core/configs/openai_api_models", "engines/vllm/vllm_engine", "engines/vllm/vllm_models")
)
"""What `import ray.serve.llm` reads of Ray's package and imports vLLM in turn."""


def names_missing_here() -> list[str]:
    """Return what Serve LLM of the installed Ray imports and the installed vLLM lacks; none where one is missing."""
    try:
        ray, vllm = (find_spec(name) for name in ("ray", "vllm"))
        if not (ray and ray.origin and vllm and vllm.origin):
            return []
        return names_missing(Path(ray.origin).parent, Path(vllm.origin).parent)
    except (OSError, SyntaxError, ValueError):  # a package that cannot be read: whoever imports it learns why
        return []


def names_missing(ray: Path, vllm: Path) -> list[str]:
    """Return MODULE.NAME of what is missing, from the folders of the two packages."""
    imported = {name for file in IMPORTERS for name in names_imported(ray / file)}
    return sorted(f"{module}.{name}" for module, name in imported if not _has(vllm, module, name))


def names_imported(file: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of what a file takes of vLLM when it is imported; nothing where it is not there."""
    if not file.is_file():
        return
    for statement in _executed(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("vllm."):
            yield from ((str(statement.module), alias.name) for alias in statement.names)


def files_of(module: str) -> tuple[str, str]:
    """Return the files that may hold a module of vLLM, relative to its package."""
    path = module.removeprefix("vllm.").replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def _executed(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that an import executes: none under TYPE_CHECKING, in functions or after an error."""
    for statement in statements:
        yield statement
        if isinstance(statement, ast.Try):
            yield from _executed(statement.body)


def _has(vllm: Path, module: str, name: str) -> bool:
    if any((vllm / file).is_file() for file in files_of(f"{module}.{name}")):
        return True
    texts = [path.read_text(encoding="utf-8") for file in files_of(module) if (path := vllm / file).is_file()]
    return any(re.search(rf"\b{name}\b", text) for text in texts)
