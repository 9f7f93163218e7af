"""Package layers: what may import what (ci/layers.py), what is imported late, and who may name a device."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from ci import layers

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PLACES = {layers.PACKAGE: ROOT, layers.EMULATOR: ROOT / "softnpu" / "src"}
"""Each package, and the folder in which it stands."""


class Edge(NamedTuple):
    """One import: in line ``line``, ``target`` is imported. ``early``: when the file itself is imported."""

    target: str
    line: int
    early: bool


Graph = Mapping[str, list[Edge]]


def package_files() -> dict[str, Path]:
    """Return each module's name and file, of both packages."""
    found = {}
    for package, folder in PLACES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = package_files()
SOURCES = {name: path.read_text() for name, path in FILES.items()}
EVERY_MODULE = pytest.mark.parametrize("module", SOURCES)


def import_edges(source: str, modules: Mapping[str, object]) -> list[Edge]:
    """Return every import of a file, wherever it stands: at the top, in a function, under TYPE_CHECKING.

    ``from a import b`` is an import of module ``a.b`` where there is one in ``modules``. Relative imports are left out;
    `test_imports_are_absolute` forbids them.
    """
    return list(_edges_below(ast.parse(source), modules, early=True))


def _edges_below(node: ast.AST, modules: Mapping[str, object], early: bool) -> Iterator[Edge]:
    if isinstance(node, ast.Import):
        yield from (Edge(alias.name, node.lineno, early) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names if node.level == 0 else ():
            full = f"{node.module}.{alias.name}"
            yield Edge(full if full in modules else str(node.module), node.lineno, early)
    else:
        for field, value in ast.iter_fields(node):
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
            )
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _edges_below(child, modules, early and not later)


def import_graph(sources: Mapping[str, str]) -> dict[str, list[Edge]]:
    """Return the imports of every module."""
    return {name: import_edges(source, sources) for name, source in sources.items()}


def folder_of(module: str) -> str:
    """Return the folder or file of vllm_ray_ascend/ in which a module stands, as ci/layers.py names it."""
    return module.split(".")[1] if "." in module else "__init__"


def in_package(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_violations(graph: Graph) -> list[str]:
    """Return imports from the same layer, or from one above, in another folder; and those in layers.NEVER."""
    found = []
    for module, edges in graph.items():
        for target, line, _ in edges:
            if not (in_package(module, layers.PACKAGE) and in_package(target, layers.PACKAGE)):
                continue
            own, other = folder_of(module), folder_of(target)
            if own == other:
                continue
            if layers.LEVELS[other] >= layers.LEVELS[own]:
                found.append(f"{module}:{line} imports {target}, which is not in a layer below")
            if (own, other) in layers.NEVER:
                found.append(f"{module}:{line} imports {target}: never {own} -> {other}")
    return found


def distribution_violations(graph: Graph) -> list[str]:
    """Return imports of the software NPU by the plugin, or of the plugin by the software NPU."""
    pairs = ((layers.PACKAGE, layers.EMULATOR), (layers.EMULATOR, layers.PACKAGE))
    return [
        f"{module}:{line} imports {target}: never {own} -> {other}"
        for module, edges in graph.items()
        for target, line, _ in edges
        for own, other in pairs
        if in_package(module, own) and in_package(target, other)
    ]


def import_circles(graph: Graph) -> list[list[str]]:
    """Return the strongly connected components of more than one module, and modules that import themselves."""
    reached = {module: reachable_modules(graph, module) for module in graph}
    circles = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(circle) for circle in circles if circle)


def reachable_modules(graph: Graph, start: str, early_only: bool = False) -> set[str]:
    """Return the modules that ``start`` imports, directly or through others."""
    found: set[str] = set()
    pending = [start]
    while pending:
        for target, _, early in graph[pending.pop()]:
            if target in graph and target not in found and (early or not early_only):
                found.add(target)
                pending.append(target)
    return found


def heavy_imports(edges: list[Edge]) -> list[str]:
    """Return the packages of layers.HEAVY that a file imports when it is imported."""
    return sorted({edge.target.partition(".")[0] for edge in edges if edge.early} & layers.HEAVY)


GRAPH = import_graph(SOURCES)


def test_every_folder_has_a_layer() -> None:
    folders = {folder_of(module) for module in SOURCES if in_package(module, layers.PACKAGE)}
    assert folders == set(layers.LEVELS)
    assert sum(len(layer.members) for layer in layers.LAYERS) == len(layers.LEVELS), "a folder has two layers"


def test_imports_come_from_layers_below() -> None:
    assert layer_violations(GRAPH) == []


def test_plugin_and_software_npu_do_not_import_each_other() -> None:
    assert distribution_violations(GRAPH) == []


def test_there_is_no_import_circle() -> None:
    assert import_circles(GRAPH) == []


def test_imports_are_absolute() -> None:
    """`import_edges` leaves relative ones out; softnpu/site is a folder of top-level modules for PYTHONPATH."""
    relative = {
        f"{module}:{node.lineno}"
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level and not in_package(module, "softnpu.site")
    }
    assert relative == set()


def typing_only_imports(source: str) -> list[str]:
    """Return the imports of the plugin's modules under TYPE_CHECKING: they hide circles, and no type needs them."""
    blocks = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    return [
        edge.target
        for block in blocks
        if "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for edge in _edges_below(statement, {}, early=False)
        if in_package(edge.target, layers.PACKAGE)
    ]


@EVERY_MODULE
def test_own_modules_are_not_imported_for_type_checkers_only(module: str) -> None:
    assert typing_only_imports(SOURCES[module]) == []


@EVERY_MODULE
def test_heavy_packages_are_imported_late(module: str) -> None:
    path = FILES[module].relative_to(PLACES[module.partition(".")[0]]).as_posix()
    if not path.startswith(layers.LATE):
        heavy = heavy_imports(GRAPH[module])
        assert not heavy, f"{path} imports {', '.join(heavy)} when it is imported"


@pytest.mark.parametrize("entry", layers.ENTRIES)
def test_entry_points_import_nothing_heavy(entry: str) -> None:
    reached = {entry} | reachable_modules(GRAPH, entry, early_only=True)
    assert {module: heavy for module in reached if (heavy := heavy_imports(GRAPH[module]))} == {}


def test_late_files_exist() -> None:
    gone = [each for each in layers.LATE if not (PLACES[each.partition("/")[0]] / each).exists()]
    assert gone == []


def test_architecture_page_has_the_table_of_layers() -> None:
    assert "<!-- table: layers -->" in (ROOT / "docs" / "architecture.md").read_text()
    assert {name for _, name, _ in layers.table_rows()} == {f"`{name}`" for name in layers.LEVELS if name != "__init__"}


DEVICE_MODULES = {("torch", "npu"), ("torch", "cuda")}


def device_names(tree: ast.AST) -> Iterator[str]:
    """Yield the places that name torch.npu, torch.cuda or torch_npu, by import or by attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in DEVICE_MODULES:
                yield f"{node.value.id}.{node.attr} in line {node.lineno}"
        elif isinstance(node, ast.Name) and node.id == "torch_npu":
            yield f"torch_npu in line {node.lineno}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
            for name in names:
                first, _, rest = name.partition(".")
                if first == "torch_npu" or (first, rest.partition(".")[0]) in DEVICE_MODULES:
                    yield f"{name} in line {node.lineno}"


@EVERY_MODULE
def test_only_accelerators_name_a_device(module: str) -> None:
    if in_package(module, layers.PACKAGE) and folder_of(module) != "accelerators":
        assert list(device_names(ast.parse(SOURCES[module]))) == []


# The rules can fail: each is given sources that break it.


def graph_of(**sources: str) -> dict[str, list[Edge]]:
    """Return the graph of modules of our package; in names ``__`` stands for a dot."""
    return import_graph({f"vllm_ray_ascend.{name.replace('__', '.')}": text for name, text in sources.items()})


UPWARD = "from vllm_ray_ascend.executor import executor"


@pytest.mark.parametrize(
    "source",
    [
        UPWARD,
        "import vllm_ray_ascend.executor.executor",
        f"def connect():\n    {UPWARD}",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {UPWARD}",
        f"try:\n    {UPWARD}\nexcept ImportError:\n    pass",
        f"class Client:\n    async def connect(self):\n        with self:\n            {UPWARD}",
    ],
)
def test_imports_from_above_are_found(source: str) -> None:
    (found,) = layer_violations(graph_of(control__client=source, executor__executor=""))
    assert "not in a layer below" in found
    assert layer_violations(graph_of(executor__executor="from vllm_ray_ascend.control import client")) == []


def test_imports_from_the_same_layer_are_found() -> None:
    assert layer_violations(graph_of(control__client="from vllm_ray_ascend.hccl.types import x"))
    assert layer_violations(graph_of(control__client="from vllm_ray_ascend.control.protocol import x")) == []


@pytest.mark.parametrize(("own", "other"), layers.NEVER)
def test_imports_that_are_never_allowed_are_found(own: str, other: str) -> None:
    found = layer_violations(graph_of(**{f"{own}__x": f"from vllm_ray_ascend.{other}.y import z"}))
    assert any(f"never {own} -> {other}" in each for each in found)


def test_imports_across_the_distributions_are_found() -> None:
    assert distribution_violations(
        import_graph({"softnpu.cli": "from vllm_ray_ascend.errors import VllmRayAscendError"})
    )
    assert distribution_violations(graph_of(cli__main="def run():\n    import softnpu.cli"))
    assert distribution_violations(graph_of(cli__main="import vllm_ray_ascend.softnpu")) == []


def test_import_circles_are_found() -> None:
    circle = {
        "executor__executor": "from vllm_ray_ascend.executor.startup import x",
        "executor__startup": "def start():\n    from vllm_ray_ascend.executor import supervisor",
        "executor__supervisor": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    " + UPWARD,
    }
    (found,) = import_circles(graph_of(**circle, executor__worker=UPWARD))
    assert found == [f"vllm_ray_ascend.executor.{name}" for name in ("executor", "startup", "supervisor")]
    assert import_circles(graph_of(**{**circle, "executor__supervisor": ""})) == []


def test_imports_for_type_checkers_only_are_found() -> None:
    head = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
    assert typing_only_imports(f"{head}{UPWARD}") == ["vllm_ray_ascend.executor"]
    assert typing_only_imports(f"{head}import torch") == []


@pytest.mark.parametrize(
    ("source", "heavy"),
    [
        ("import torch.nn", ["torch"]),
        ("from vllm.v1 import engine", ["vllm"]),
        ("try:\n    import ray\nexcept ImportError:\n    ray = None", ["ray"]),
        ("class Worker:\n    import torch_npu", ["torch_npu"]),
        ("def run():\n    import torch", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", []),
        ("import raytracer", []),
    ],
)
def test_heavy_imports_are_found(source: str, heavy: list[str]) -> None:
    assert heavy_imports(import_edges(source, {})) == heavy


@pytest.mark.parametrize(
    "line",
    [
        "torch.npu.synchronize()",
        "x = torch.cuda",
        "import torch_npu",
        "import torch.cuda.graphs",
        "from torch_npu.npu import x",
        "from torch import npu",
        "from torch.cuda.graphs import x",
    ],
)
def test_every_way_to_name_a_device_is_found(line: str) -> None:
    assert list(device_names(ast.parse(line)))
