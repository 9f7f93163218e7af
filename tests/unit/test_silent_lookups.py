"""Our code looks up no private name of upstream silently that is in neither table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ci.contract.silent_lookups import Lookup, listed, silent_lookups, unlisted

pytestmark = pytest.mark.unit


def test_every_private_name_that_is_looked_up_silently_is_in_a_table() -> None:
    found = unlisted()
    assert not found, "list these in ci/contract/facts.toml, with the releases that have them:\n" + "\n".join(
        f"vllm_ray_ascend/{file}:{line}: {name}" for file, line, name in found
    )


@pytest.mark.parametrize(
    "text",
    [
        "getattr(x, '_gone', None)",
        "hasattr(x, '_gone')",
        "vars(x).get('_gone')",
        "x.__dict__.pop('_gone', None)",
        "NAME = '_gone'\nx.__dict__.get(NAME)",
        "for name in ('_gone', 'public'):\n    getattr(x, name, None)",
        "NAMES = ('_gone',)\ndef f(x):\n    return [getattr(x, name, None) for name in NAMES]",
        "try:\n    x._gone()\nexcept (AttributeError, TypeError):\n    pass",
        "try:\n    from ray import _gone\nexcept ImportError:\n    _gone = None",
        "try:\n    import ray._gone.state\nexcept ModuleNotFoundError:\n    pass",
        "try:\n    x._gone()\nexcept:\n    pass",
        "with contextlib.suppress(Exception):\n    x._gone()",
    ],
)
def test_a_silent_lookup_is_found(text: str) -> None:
    assert [name for _, name in silent_lookups(ast.parse(text))] == ["_gone"]


@pytest.mark.parametrize(
    "text",
    [
        "x._gone",
        "getattr(x, '_gone')",
        "getattr(x, 'public', None)",
        "getattr(x, '_vllm_ray_ascend_state', None)",
        "try:\n    x._gone()\nexcept AttributeError as error:\n    raise Changed() from error",
        "try:\n    x._gone()\nexcept OSError:\n    pass",
    ],
)
def test_a_loud_lookup_is_not(text: str) -> None:
    assert not list(silent_lookups(ast.parse(text)))


def test_a_new_one_in_our_sources_is_reported_unless_it_is_ours_or_listed(tmp_path: Path) -> None:
    text = "class A:\n    def f(self, x):\n        self._ours = 1\n        return "
    names = ["_ours", "_npu_releasePool", "_brand_new"]
    (tmp_path / "a.py").write_text(text + ", ".join(f"getattr(x, {name!r}, None)" for name in names))
    assert "_npu_releasePool" in listed()
    assert unlisted(tmp_path) == [Lookup("a.py", 4, "_brand_new")]
