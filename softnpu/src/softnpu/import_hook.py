"""Run a function right after a module was imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def call_when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once module ``name`` was imported; immediately if it already was.

    The callback runs inside the import, so the importer sees what it raises. A second request with the same module and
    function is ignored.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
    elif not any(isinstance(finder, _CallbackFinder) and finder.matches(name, callback) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CallbackFinder(name, callback))


class _CallbackFinder(MetaPathFinder):
    """Finds ``name`` through the other finders and wraps its loader; leaves sys.meta_path once the module was executed.

    Not when it was found: many packages only ask whether another is installed.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self._name = name
        self._callback = callback
        self._delegating = False

    def matches(self, name: str, callback: Callback) -> bool:
        """Return whether this finder waits for ``name`` with this callback."""
        return (self._name, self._callback) == (name, callback)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, with a loader that calls back."""
        if fullname != self._name or self._delegating:
            return None
        self._delegating = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._delegating = False
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self._finish_import)
        return spec

    def _finish_import(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self._callback(module)


class _CallbackLoader(Loader):
    """Loads as the wrapped loader does, then calls back. Every other attribute is the wrapped loader's."""

    def __init__(self, wrapped: Loader, callback: Callback) -> None:
        self._wrapped = wrapped
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then call back."""
        self._wrapped.exec_module(module)
        self._callback(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
