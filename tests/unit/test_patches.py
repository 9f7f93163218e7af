"""The table of upstream names that we patch: how it is applied, and that nothing in the package goes round it."""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import vllm_ray_ascend
from vllm_ray_ascend import patches
from vllm_ray_ascend.cli.main import main
from vllm_ray_ascend.errors import UpstreamChangedError
from vllm_ray_ascend.patches import Kind, Patch

pytestmark = pytest.mark.unit

PACKAGE = Path(vllm_ray_ascend.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3
CALLS: list[str] = []


def doubled(value: int) -> int:
    return value * 2


def upstream(value: int, *, extra: int = 1) -> int:
    return min(doubled(value) + extra, LIMIT)


FUNCTION = f"{__name__}.upstream"


def add_row(monkeypatch: pytest.MonkeyPatch, module: str, *names: str, kind: Kind = "replace") -> None:
    row = Patch(module, names, kind, "plugin.py", "what", "why", "vllm", "later", "now")
    for target in row.targets:
        monkeypatch.setitem(patches.ROWS, target, row)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an upstream module with a function and a class, in the table as ``made.up``."""
    made: Any = ModuleType("made.up")
    made.function = FunctionType((lambda: "upstream").__code__, {"__name__": "vllm.made"})
    made.Class = type("Class", (), {"__module__": "vllm.made", "method": lambda self: "upstream"})
    monkeypatch.setitem(__import__("sys").modules, "made.up", made)
    add_row(monkeypatch, "made.up", "function", "Class", "Class.method", "gone")
    add_row(monkeypatch, "made.up", "added", kind="add")
    return made


def test_apply_replaces_and_keeps_what_was_there(module: Any) -> None:
    before = module.function
    assert not patches.is_applied("made.up.function")
    for name in ("first", "second"):
        ours = FunctionType((lambda: __name__).__code__, {"__name__": f"vllm_ray_ascend.{name}"})
        patches.apply("made.up.function", ours)
        assert module.function() == f"vllm_ray_ascend.{name}"
        assert patches.original("made.up.function") is before
    assert patches.is_applied("made.up.function")


def test_a_name_without_a_row_is_not_patched(module: Any) -> None:
    module.other = before = object()
    with pytest.raises(UpstreamChangedError, match=r"VRA-101: made\.up\.other is not in the table"):
        patches.apply("made.up.other", None)
    assert module.other is before


@pytest.mark.parametrize("change", [patches.apply, patches.wrap])
def test_a_name_that_is_gone_is_an_error(module: Any, change: Callable[[str, Any], None]) -> None:
    with pytest.raises(UpstreamChangedError, match=r"VRA-102: made\.up\.gone is gone.*plugin\.py: what"):
        change("made.up.gone", lambda _: None)
    assert not hasattr(module, "gone")


def test_a_name_is_added_where_there_is_none(module: Any) -> None:
    patches.apply("made.up.added", 1)
    assert module.added == 1 and patches.is_applied("made.up.added")


def test_a_method_is_wrapped_once(module: Any) -> None:
    for _ in range(2):
        patches.wrap("made.up.Class.method", lambda before: lambda self: f"ours({before(self)})")
    assert module.Class().method() == "ours(upstream)"


@pytest.mark.parametrize("change", ["wrap", "apply"])
def test_a_method_of_an_actor_class_is_patched_too(module: Any, change: str) -> None:
    """Ray has wrapped it there, with what was inherited then; what the class itself overrides stays."""
    from ray.util.tracing.tracing_helper import _inject_tracing_into_class

    actor = _inject_tracing_into_class(type("Actor", (module.Class,), {}))
    other = type("Other", (module.Class,), {"method": functools.wraps(module.Class.method)(lambda self: "other")})
    assert "method" in vars(actor)
    if change == "wrap":
        patches.wrap("made.up.Class.method", lambda before: lambda self: f"ours({before(self)})")
    else:
        patches.apply("made.up.Class.method", lambda self: "ours(upstream)")
    assert actor().method() == "ours(upstream)" and other().method() == "other"


def test_an_owner_is_patched_without_its_parent(module: Any) -> None:
    child = type("Child", (module.Class,), {})
    patches.apply("made.up.Class.method", lambda self: "ours", owner=child)
    assert child().method() == "ours" and module.Class().method() == "upstream"
    assert patches.is_applied("made.up.Class.method", child) and not patches.is_applied("made.up.Class.method")
    assert not patches.is_applied("made.up.Class.method", type("Grandchild", (child,), {}))


def test_who_was_there_before_is_named(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    @functools.wraps(module.function)
    def frameworks() -> str:
        return "framework"

    module.function = frameworks
    with caplog.at_level(logging.WARNING):
        patches.apply("made.up.function", lambda: "ours")
    assert f"VRA-105: made.up.function was replaced by {__name__}.frameworks" in caplog.text
    assert module.function() == "ours"


def test_a_subclass_of_what_was_there_before_needs_no_warning(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Framework(module.Class):  # type: ignore[misc]
        pass

    module.Class = Framework
    with caplog.at_level(logging.WARNING):
        patches.apply("made.up.Class", type("Ours", (Framework,), {}))
    assert not caplog.text


def test_what_others_put_around_ours_stays(module: Any) -> None:
    patches.apply("made.up.function", lambda: "ours")
    ours = module.function
    module.function = lambda: f"framework({ours()})"
    patches.apply("made.up.function", lambda: "ours again")
    assert module.function() == "framework(ours)"


def test_entries_are_added_and_none_is_changed(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    add_row(monkeypatch, "made.up", "mapping", kind="add")
    module.mapping = {"a": 1}
    patches.add_entries("made.up.mapping", {"a": 2, "b": 3})
    assert module.mapping == {"a": 1, "b": 3}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(monkeypatch, __name__, "upstream:doubled", "upstream:LIMIT", "upstream:absent", "upstream:threading")
    CALLS.clear()


@pytest.mark.usefixtures("rows")
def test_globals_are_replaced_for_that_function_only() -> None:
    rebound: Any = patches.with_globals(FUNCTION, upstream, doubled=lambda value: -value, LIMIT=100)
    assert rebound(4) == -3 and rebound(4, extra=10) == 6
    assert upstream(1) == 3 and LIMIT == 3


@pytest.mark.usefixtures("rows")
def test_of_a_bound_method_the_function_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Class:
        def method(self) -> int:
            return LIMIT

    path = "test_of_a_bound_method_the_function_is_returned.<locals>.Class.method"
    add_row(monkeypatch, __name__, f"{path}:LIMIT")
    assert patches.with_globals(f"{__name__}.{path}", Class().method, LIMIT=7)(Class()) == 7


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("name", ["absent", "threading"])
def test_a_global_that_the_function_does_not_use_is_an_error(name: str) -> None:
    with pytest.raises(UpstreamChangedError, match=rf"VRA-103: .*upstream no longer uses {name}"):
        patches.with_globals(FUNCTION, upstream, **{name: None})


@pytest.mark.usefixtures("rows")
def test_a_global_without_a_row_is_not_replaced() -> None:
    with pytest.raises(UpstreamChangedError, match="VRA-101"):
        patches.with_globals(FUNCTION, upstream, min=max)


@pytest.mark.usefixtures("rows")
def test_threads_are_kept_apart() -> None:
    import threading

    wrong: list[tuple[int, int]] = []

    def check(factor: int) -> None:
        for value in range(2000):
            rebound = patches.with_globals(FUNCTION, upstream, doubled=lambda v: v * factor, LIMIT=10**9)
            if (result := rebound(value)) != value * factor + 1:
                wrong.append((value, result))

    threads = [threading.Thread(target=check, args=(factor,)) for factor in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def wrapped_by_closure(before: Any) -> Any:
    @functools.wraps(before)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        CALLS.append("closure")
        return before(*args, **kwargs)

    return wrapper


def wrapped_by_default(before: Any) -> Any:
    def wrapper(value: int, before: Any = before) -> Any:
        CALLS.append("default")
        return before(value)

    return wrapper


def wrapped_by_keyword(before: Any) -> Any:
    def wrapper(value: int, *, before: Any = before) -> Any:
        CALLS.append("keyword")
        return before(value)

    return wrapper


_before: Any = upstream


def wrapped_by_global(_: Any) -> Any:
    def wrapper(value: int) -> Any:
        CALLS.append("global")
        return _before(value)

    return wrapper


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    "wrappers",
    [
        [wrapped_by_closure],
        [wrapped_by_default],
        [wrapped_by_keyword],
        [wrapped_by_global],
        [wrapped_by_default, wrapped_by_closure],
        [wrapped_by_global, wrapped_by_keyword, wrapped_by_closure],
    ],
)
def test_a_wrapper_is_called_and_calls_the_function_with_our_globals(wrappers: list[Any]) -> None:
    wrapped: Any = functools.reduce(lambda inner, wrapper: wrapper(inner), wrappers, upstream)
    for _ in range(2):
        CALLS.clear()
        assert patches.with_globals(FUNCTION, wrapped, doubled=lambda value: -value)(4) == -3
        assert [wrapper.__name__.removeprefix("wrapped_by_") for wrapper in reversed(wrappers)] == CALLS
    assert wrapped(4) == 3, "the wrapper itself is as it was"


@pytest.mark.usefixtures("rows")
def test_who_replaced_the_function_is_named() -> None:
    def frameworks(value: int) -> int:
        return value

    frameworks.__qualname__ = upstream.__qualname__ + "_"
    with pytest.raises(
        UpstreamChangedError, match=rf"VRA-104: .* was replaced by {__name__}\.frameworks, which does not"
    ):
        patches.with_globals(FUNCTION, frameworks, LIMIT=1)


@pytest.mark.usefixtures("rows")
def test_a_wrapper_that_hides_the_function_is_named() -> None:
    with pytest.raises(UpstreamChangedError, match=r"VRA-104: .* was replaced by functools\.partial"):
        patches.with_globals(FUNCTION, functools.partial(upstream, 1), LIMIT=1)


def test_each_target_stands_in_one_row_with_every_field() -> None:
    targets = [target for patch in patches.PATCHES for target in patch.targets]
    assert len(targets) == len(set(targets)) == len(patches.ROWS)
    for patch in patches.PATCHES:
        assert all(patch) and patch.kind in patches.KINDS
        assert (PACKAGE / patch.by).is_file(), patch.by
        assert (":" in "".join(patch.names)) == (patch.kind == "rebind")


NODES = [
    node
    for path in PACKAGE.rglob("*.py")
    if path.name != "patches.py"
    for node in ast.walk(ast.parse(path.read_text()))
]
LITERALS = {node.value for node in NODES if isinstance(node, ast.Constant) and isinstance(node.value, str)}
KEYWORDS = {node.arg for node in NODES if isinstance(node, ast.keyword)}


@pytest.mark.parametrize("target", patches.ROWS)
def test_each_row_is_applied_somewhere(target: str) -> None:
    """Its target is written in our code, as one literal or as two."""
    function, _, replaced = target.partition(":")
    dots = [match.start() for match in re.finditer(r"\.", function)]
    halves = [{function[:dot], function[dot:]} for dot in dots] + [
        {function[:dot], function[dot + 1 :]} for dot in dots
    ]
    assert function in LITERALS or any(half <= LITERALS for half in halves), f"nothing applies {target}"
    assert not replaced or replaced in LITERALS | KEYWORDS


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.targets[0])
def test_patches_for_upstream_that_a_row_names_exist(patch: Patch) -> None:
    for name in re.findall(r"patches/([\w-]+/\d{4})", patch.why + patch.removable):
        assert list((ROOT / "patches").glob(f"{name}-*.patch")), name


ALLOWED: dict[tuple[str, str], str] = {
    (
        "accelerators/npu.py",
        "type(current_platform)._global_graph_pool",
    ): "state: None has the platform make a new pool",
    ("elastic_ep/groups.py", "_world.pg_group_ranks[self.device_group]"): "state: torch's table of ranks, by group",
    ("engine/rank_client.py", "client"): "one engine's client forgets ranks, as vLLM's scaling does",
    ("engine/elastic_client.py", "client"): "values of one engine's client, as they were before a scaling",
    ("engine/elastic_client.py", "config"): "values of one engine's configuration, as they were before a scaling",
    ("engine/exit_code.py", "self"): "state: whether this engine had failed before it was shut down",
    ("environment/paths.py", "config"): "values of one engine's configuration",
    ("executor/worker.py", "self.worker"): "an object of our own class, phase_reporting_wrapper",
    ("ipc/message_queue.py", "self.handle"): "state: the address of our own queue, which travels on its handle",
    ("ray_transport/accelerator_context.py", "self"): "state: what a channel's next write waits for",
}
"""What is set by other means, and why that is no patch: state of one object, under no name of upstream's."""


def foreign_assignments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where attributes of imported upstream modules or classes are set, and every `setattr`, whatever it is of."""
    upstream_names = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if is_upstream(node.module or "" if isinstance(node, ast.ImportFrom) else alias.name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "type.__setattr__"):
            yield node.lineno, ast.unparse(node.args[0])
        for target in targets_of(node):
            if isinstance(target, ast.Attribute | ast.Subscript) and names_in(target.value) & upstream_names:
                yield target.lineno, ast.unparse(target)


def is_upstream(module: str) -> bool:
    return module.partition(".")[0] in ("vllm", "vllm_ascend", "ray", "torch", "torch_npu")


def names_in(node: ast.AST) -> set[str]:
    """Names of which ``node`` is an attribute; what an index or an argument names does not count."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "type":
        return {each.id for each in ast.walk(node.args[0]) if isinstance(each, ast.Name)}
    return {node.id} if isinstance(node, ast.Name) else set()


def targets_of(node: ast.AST) -> list[ast.expr]:
    given: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        given = list(node.targets)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        given = [node.target]
    return [
        each for target in given for each in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_upstreams_attributes_are_set_in_patches_alone(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if name == "patches.py":
        return
    bypassing = [
        f"{name}:{line}: {what}"
        for line, what in foreign_assignments(ast.parse(path.read_text()))
        if (name, what) not in ALLOWED
    ]
    assert not bypassing, "not by patches.apply or patches.wrap: " + "; ".join(bypassing)


def test_what_is_allowed_is_still_there() -> None:
    for name, what in ALLOWED:
        found = {each for _, each in foreign_assignments(ast.parse((PACKAGE / name).read_text()))}
        assert what in found, f"{name} no longer sets {what}: take it out of ALLOWED"


@pytest.mark.parametrize(
    "line",
    [
        "import vllm.v1.utils; vllm.v1.utils.x = 1",
        "from vllm.v1 import utils; utils.x = 1",
        "from vllm.v1.engine.core import EngineCore as E; E.step = None",
        "from vllm.v1.engine.core import EngineCore; EngineCore.a, EngineCore.b = 1, 2",
        "from vllm.platforms import current_platform; type(current_platform).x = 1",
        "from vllm import envs; envs.environment_variables['a'] = 1",
        "from vllm import envs; del envs.x",
        "setattr(anything, 'x', 1)",
    ],
)
def test_the_rule_sees_every_way_to_set_one(line: str) -> None:
    assert list(foreign_assignments(ast.parse(line)))


def test_the_command_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--patches"]) == 0
    shown = capsys.readouterr().out
    assert all(target in shown for target in patches.ROWS)
    assert main(["env", "--patches", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {target for row in rows for target in row["targets"]} == set(patches.ROWS)
    assert {"kind", "by", "what", "why", "releases", "removable", "applied"} < set(rows[0])
