"""Private names of upstream that our code looks up without an error where they are gone: each has to be in a table.

A default, `hasattr` or a caught AttributeError turns a renamed upstream name into a feature that silently is off. So
each such name stands in vllm_ray_ascend/patches.py or ci/contract/facts.toml, with the releases that have it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from ci.contract.facts import PACKAGE, written
from vllm_ray_ascend.patches import PATCHES

_PRIVATE = re.compile(r"_(?!vllm_ray_ascend)[A-Za-z]\w*")
_CAUGHT = {"AttributeError", "ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
_OF_PYTHON = {"_initializing"}
"""Private names of Python's own import system."""
_Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


class Lookup(NamedTuple):
    """A private name that may be gone without an error."""

    file: str
    line: int
    name: str


def unlisted(package: Path = PACKAGE) -> list[Lookup]:
    """Return the silent lookups of private names that are neither ours nor in a table."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    known = listed() | _OF_PYTHON | {name for tree in trees.values() for name in own_names(tree)}
    return [
        Lookup(path.relative_to(package).as_posix(), line, name)
        for path, tree in trees.items()
        for line, name in silent_lookups(tree)
        if name not in known
    ]


def listed() -> set[str]:
    """Return every name in the table of patches and in the contract's facts."""
    texts = [name for patch in PATCHES for name in patch.names]
    texts += [text for place in written() for text in (place.of, *place.has, *place.uses, *place.says)]
    return {word for text in texts for word in re.findall(r"\w+", text)}


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield what our code defines: functions, classes, and attributes that it sets on ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (*_Functions, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def silent_lookups(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name that ``tree`` looks up with a default, or with its absence caught."""
    constants = _constants(tree)
    for function in _scopes(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                names = _asked(node, function, constants)
            elif _survives_absence(node):
                names = _used(node.body)
            else:
                continue
            yield from ((node.lineno, name) for name in sorted(names) if _PRIVATE.fullmatch(name))


def _scopes(tree: ast.Module) -> list[ast.AST]:
    """Return the outermost functions and methods, and the other statements of modules and classes."""
    found: list[ast.AST] = []
    bodies: list[Sequence[ast.stmt]] = [tree.body]
    for body in bodies:
        for node in body:
            if isinstance(node, ast.ClassDef):
                bodies.append(node.body)
            else:
                found.append(node)
    return found


def _asked(call: ast.Call, function: ast.AST, constants: dict[str, set[str]]) -> set[str]:
    """Return the names that a `getattr` with a default, a `hasattr`, or a `get` or `pop` of attributes asks for."""
    called, arguments = ast.unparse(call.func), call.args
    if called.endswith(".get") or (called.endswith(".pop") and len(arguments) == 2):
        return set() if called.startswith("os.environ") else _key(arguments, constants)
    if (called, len(arguments)) not in {("getattr", 3), ("hasattr", 2)}:
        return set()
    if names := _texts(arguments[1]):
        return names
    variables = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return _texts(function).union(*(constants[name] for name in variables if name in constants))


def _key(arguments: Sequence[ast.expr], constants: dict[str, set[str]]) -> set[str]:
    """Return the first of a call's arguments, where that is a text or a constant of the module."""
    match arguments:
        case [ast.Constant() as text, *_]:
            return _texts(text)
        case [ast.Name(id=name), *_]:
            return constants.get(name, set())
    return set()


def _constants(tree: ast.Module) -> dict[str, set[str]]:
    """Return the texts in the value of each variable of a module."""
    return {
        target.id: _texts(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _texts(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def _survives_absence(node: ast.AST) -> TypeGuard[ast.Try | ast.With]:
    """Whether a missing name in the body of ``node`` goes unnoticed."""
    if isinstance(node, ast.Try):
        return any(map(_swallows, node.handlers))
    return isinstance(node, ast.With) and any(_suppresses(item.context_expr) for item in node.items)


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches a missing name and raises nothing itself."""
    caught = {"BaseException"} if handler.type is None else set(re.findall(r"\w+", ast.unparse(handler.type)))
    return bool(caught & _CAUGHT) and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def _suppresses(context: ast.expr) -> bool:
    text = ast.unparse(context)
    return "suppress(" in text and bool(set(re.findall(r"\w+", text)) & _CAUGHT)


def _used(body: Sequence[ast.stmt]) -> set[str]:
    """Return the attributes and imports in ``body``."""
    found: set[str] = set()
    for node in (each for statement in body for each in ast.walk(statement)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
    return found
