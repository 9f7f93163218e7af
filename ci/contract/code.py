"""Facts of Python source, read from its syntax tree. Nothing is imported or run."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

_Functions = (ast.FunctionDef, ast.AsyncFunctionDef)
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.lru_cache(maxsize=512)
def parse(text: str) -> ast.Module:
    """Return the tree of a module."""
    return ast.parse(text)


def find(tree: ast.Module, qualified: str) -> Named | ast.Module | None:
    """Return the class or function with this name, such as "Class.method"; the module itself for an empty one."""
    found: ast.AST = tree
    for part in filter(None, qualified.split(".")):
        inner = [node for node in _body(found) if isinstance(node, Named) and node.name == part]
        if not inner:
            return None
        found = inner[-1]  # the last definition is the one that counts
    return found  # type: ignore[return-value]


def names(node: ast.AST) -> set[str]:
    """Return what a module or class defines, imports or declares; of a class also what methods set on ``self``."""
    found: set[str] = set()
    for inner in _body(node):
        if isinstance(inner, Named):
            found.add(inner.name)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in inner.names}
        else:
            found |= {target.id for target in _targets(inner) if isinstance(target, ast.Name)}
    if isinstance(node, ast.ClassDef):
        found |= {
            target.attr
            for inner in ast.walk(node)
            for target in _targets(inner)
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
        }
    return found


def used(node: ast.AST) -> set[str]:
    """Return the names that are read anywhere in ``node``, and those that it imports itself."""
    read = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    imports = (inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom))
    return read | {alias.name for inner in imports for alias in inner.names}


def parameters(node: ast.AST) -> list[str]:
    """Return the names of a function's parameters, in order."""
    if not isinstance(node, _Functions):
        return []
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in every if argument is not None]


def says(node: ast.AST, text: str) -> bool:
    """Whether an expression or statement is somewhere in ``node``, however it is laid out."""
    (statement,) = ast.parse(text).body
    wanted = statement.value if isinstance(statement, ast.Expr) else statement
    plain = _plain(wanted)
    return any(type(inner) is type(wanted) and _plain(inner) == plain for inner in ast.walk(node))


def bases(node: ast.AST) -> list[str]:
    """Return the base classes, as they are written."""
    return [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []


def fingerprint(node: ast.AST) -> str:
    """Return a hash of what a function or class does, without layout, comments, docstrings and annotations."""
    return hashlib.sha256(repr(_plain(node)).encode()).hexdigest()[:12]


def _plain(node: Any) -> Any:
    """Return ``node`` as tuples, the same in every version of Python and wherever an expression stands."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    for name in ("ctx", "annotation", "returns", "type_comment", "kind"):
        fields.pop(name, None)
    if isinstance(node, Named) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return (type(node).__name__, [(name, _plain(value)) for name, value in sorted(fields.items())])


def _body(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, also those under an `if`, `try` or `with`; of a function none."""
    for inner in getattr(node, "body", []):
        yield inner
        if isinstance(inner, ast.If | ast.Try | ast.With):
            yield from _under(inner)


def _under(node: ast.stmt) -> Iterator[ast.stmt]:
    branches = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    branches += [handler.body for handler in getattr(node, "handlers", [])]
    for inner in (each for branch in branches for each in branch):
        yield inner
        if isinstance(inner, ast.If | ast.Try | ast.With):
            yield from _under(inner)


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    given: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        given = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        given = [node.target]
    for target in given:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
