"""Import hooks and versions."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.compat.versions import RAY_MINIMUM, require_ray, stack
from vllm_ray_ascend.errors import RayVersionError, UpstreamChangedError

pytestmark = pytest.mark.unit


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "hooked_by_test"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "module.py").write_text("VALUE = 1\n")
    (tmp_path / name / "circle.py").write_text(f"import {name}.back\nDONE = True\n")
    (tmp_path / name / "back.py").write_text(f"import {name}.circle\n")
    (tmp_path / name / "half.py").write_text("import builtins\nbuiltins.hook_by_test()\nDONE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield name
    sys.meta_path[:] = finders
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_the_callback_runs_after_the_import_and_once(package: str) -> None:
    seen: list[int] = []

    def callback(module: ModuleType) -> None:
        seen.append(module.VALUE)

    when_imported(f"{package}.module", callback)
    when_imported(f"{package}.module", callback)
    assert f"{package}.module" not in sys.modules and seen == []
    module = importlib.import_module(f"{package}.module")
    assert seen == [1]
    assert module.__spec__ is not None and module.__spec__.loader is not None
    assert Path(module.__spec__.loader.get_filename(module.__name__)).name == "module.py"  # type: ignore[attr-defined]


def test_a_check_for_the_module_does_not_use_up_the_hook(package: str) -> None:
    seen: list[str] = []
    when_imported(f"{package}.module", lambda module: seen.append(module.__name__))
    assert importlib.util.find_spec(f"{package}.module") is not None
    assert seen == []
    importlib.import_module(f"{package}.module")
    assert seen == [f"{package}.module"]


def test_the_callback_runs_at_once_where_the_module_is_there(package: str) -> None:
    importlib.import_module(f"{package}.module")
    seen: list[str] = []
    when_imported(f"{package}.module", lambda module: seen.append(module.__name__))
    assert seen == [f"{package}.module"]


def test_the_importer_gets_what_the_callback_raises_and_may_retry(package: str) -> None:
    def refuse(module: ModuleType) -> None:
        raise UpstreamChangedError("VRA-100", module.__name__)

    when_imported(f"{package}.module", refuse)
    with pytest.raises(UpstreamChangedError):
        importlib.import_module(f"{package}.module")
    assert f"{package}.module" not in sys.modules


def test_two_callbacks_of_modules_that_import_each_other_run_when_each_is_whole(package: str) -> None:
    seen: list[str] = []
    when_imported(f"{package}.circle", lambda module: seen.append(f"circle {module.DONE}"))
    when_imported(f"{package}.back", lambda _: seen.append("back"))
    importlib.import_module(f"{package}.circle")
    assert seen == ["back", "circle True"]


@pytest.fixture
def hook_in_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let the module `half` call a function from its middle, as a module that imports vLLM calls plugins."""
    return lambda function: monkeypatch.setattr(builtins, "hook_by_test", function, raising=False)


def test_a_callback_for_a_module_whose_import_has_begun_runs_once_at_its_end(
    package: str, hook_in_import: Callable[[Callable[[], None]], None]
) -> None:
    seen: list[bool] = []

    def callback(module: ModuleType) -> None:
        seen.append(hasattr(module, "DONE"))

    def request() -> None:
        when_imported(f"{package}.half", callback)
        when_imported(f"{package}.half", callback)
        assert seen == []

    hook_in_import(request)
    importlib.import_module(f"{package}.half")
    assert seen == [True]


def test_a_second_callback_beside_one_whose_import_has_begun(
    package: str, hook_in_import: Callable[[Callable[[], None]], None]
) -> None:
    seen: list[str] = []
    when_imported(f"{package}.half", lambda _: seen.append("before"))
    hook_in_import(lambda: when_imported(f"{package}.half", lambda _: seen.append("within")))
    importlib.import_module(f"{package}.half")
    assert seen == ["before", "within"]


def test_an_import_that_fails_runs_no_callback_of_its_middle(
    package: str, hook_in_import: Callable[[Callable[[], None]], None]
) -> None:
    def request_and_fail() -> None:
        when_imported(f"{package}.half", lambda _: pytest.fail("called back"))
        raise OSError("no")

    hook_in_import(request_and_fail)
    with pytest.raises(OSError, match="no"):
        importlib.import_module(f"{package}.half")
    assert f"{package}.half" not in sys.modules


def test_the_importer_gets_what_a_callback_of_the_middle_raises(
    package: str, hook_in_import: Callable[[Callable[[], None]], None]
) -> None:
    def refuse(module: ModuleType) -> None:
        raise UpstreamChangedError("VRA-100", module.__name__)

    hook_in_import(lambda: when_imported(f"{package}.half", refuse))
    with pytest.raises(UpstreamChangedError):
        importlib.import_module(f"{package}.half")
    assert f"{package}.half" not in sys.modules


def test_a_missing_module_stays_missing(package: str) -> None:
    when_imported(f"{package}.absent", lambda _: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}.absent")


@pytest.mark.parametrize("found", [RAY_MINIMUM, "2.48.0", "2.60.0", "3.0.0.dev0", "a build of one's own"])
def test_ray_new_enough(found: str) -> None:
    require_ray(found)


@pytest.mark.parametrize(
    ("found", "said"), [(None, "not installed"), ("2.47.1", "2.47.1 is too old"), ("1.13", "1.13")]
)
def test_a_missing_or_old_ray_is_reported_with_the_remedy(found: str | None, said: str) -> None:
    with pytest.raises(RayVersionError, match=said) as raised:
        require_ray(found)
    assert f"pip install 'ray>={RAY_MINIMUM}'" in str(raised.value)


def test_stack_names_all_four() -> None:
    assert list(stack()) == ["vLLM", "vllm-ascend", "Ray", "torch-npu"] and all(stack().values())
