"""The house has floors: nothing imports from above, and what plugins load imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_ray_ascend

pytestmark = pytest.mark.unit

HOUSE = Path(vllm_ray_ascend.__file__).parent
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "log", "__init__"}),
    frozenset({"settings", "devices"}),
    frozenset({"environment", "compat"}),
    frozenset({"augment", "cluster", "graphs", "lifecycle", "softnpu"}),
    frozenset({"engine"}),
    frozenset({"executor", "platform"}),
    frozenset({"plugin"}),
    frozenset({"cli"}),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "torch_npu", "ray", "vllm", "vllm_ascend"}
LATE = ("engine/actors.py", "engine/manager.py", "executor/", "platform.py", "softnpu/ops/", "softnpu/cluster/probe.py")
"""Files that are imported only where those packages are in use."""


def files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def at_import(tree: ast.Module) -> Iterator[str]:
    """Modules imported when the file is, not later inside a function, nor for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_nothing_imports_from_a_floor_above(path: Path) -> None:
    own = ROOMS[room_of(path)]
    for name in imported(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        if package == "vllm_ray_ascend" and rest:
            room = rest.partition(".")[0]
            assert ROOMS[room] <= own, (
                f"{path.relative_to(HOUSE)} imports {name} from floor {ROOMS[room]}, above its own {own}"
            )


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_nothing_heavy_is_imported_but_late(path: Path) -> None:
    if str(path.relative_to(HOUSE)).startswith(LATE):
        return
    heavy = {name.partition(".")[0] for name in at_import(ast.parse(path.read_text()))} & HEAVY
    assert not heavy, f"{path.relative_to(HOUSE)} imports {', '.join(heavy)} when it is imported"
