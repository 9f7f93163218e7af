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
    frozenset({"accelerators", "augment", "cluster", "graphs", "lifecycle", "softnpu"}),
    frozenset({"engine", "transport"}),
    frozenset({"executor", "platform"}),
    frozenset({"compiled_graph"}),
    frozenset({"plugin"}),
    frozenset({"cli"}),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "torch_npu", "ray", "vllm", "vllm_ascend"}
LATE = (
    "compiled_graph/context.py",
    "compiled_graph/executor.py",
    "compiled_graph/graph.py",
    "compiled_graph/patience.py",
    "compiled_graph/worker.py",
    "engine/actors.py",
    "engine/going_on.py",
    "engine/manager.py",
    "executor/",
    "platform.py",
    "softnpu/ops/",
    "transport/communicator.py",
    "transport/context.py",
    "transport/direct/manager.py",
    "transport/tensors.py",
    "transport/pipeline.py",
    "softnpu/cluster/probe.py",
)
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


DEVICE_MODULES = {("torch", "npu"), ("torch", "cuda")}


def names_a_device(tree: ast.AST) -> Iterator[str]:
    """Where code says torch.npu, torch.cuda or torch_npu, by import or by attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in DEVICE_MODULES:
                yield f"{node.value.id}.{node.attr} in line {node.lineno}"
        elif isinstance(node, ast.Name) and node.id == "torch_npu":
            yield f"torch_npu in line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (
                f"torch.{a.name} in line {node.lineno}" for a in node.names if ("torch", a.name) in DEVICE_MODULES
            )
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = (tuple(name.split(".")[:2]) for name in imported(node))
            yield from (".".join(name) for name in found if name in DEVICE_MODULES or name[0] == "torch_npu")


@pytest.mark.parametrize(
    "path",
    [path for path in files() if room_of(path) not in ("accelerators", "softnpu")],
    ids=lambda path: str(path.relative_to(HOUSE)),
)
def test_only_accelerators_name_a_device(path: Path) -> None:
    assert list(names_a_device(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.npu.synchronize()",
        "x = torch.cuda",
        "import torch_npu",
        "import torch.cuda.graphs",
        "from torch_npu.npu import x",
        "from torch import npu",
    ],
)
def test_the_rule_sees_every_way_to_name_one(line: str) -> None:
    assert list(names_a_device(ast.parse(line)))
