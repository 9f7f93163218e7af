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


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once module ``name`` was imported; immediately where it already was.

    The callback runs inside the import, so that the importer gets what it raises. A second request for the same module
    and callback is ignored, while it waits.
    """
    module = sys.modules.get(name)
    if module is not None and not _is_being_imported(module):
        callback(module)
    elif any(isinstance(finder, _Finder) and finder.is_for(name, callback) for finder in sys.meta_path):
        return
    elif module is None:
        sys.meta_path.insert(0, _Finder(name, callback))
    else:
        _call_after_import(module, callback)


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _call_after_import(module: ModuleType, callback: Callback) -> None:
    """Call back when the import of ``module``, which has begun, ends: no finder is asked for it again.

    A plugin that vLLM loads is called from the middle of the modules that import vLLM.
    """
    spec: Any = module.__spec__
    spec.__class__ = _ObservedSpec
    waiting: list[Callback] = vars(spec).setdefault("waiting", [])
    if callback not in waiting:
        waiting.append(callback)


class _ObservedSpec(ModuleSpec):
    """The spec of a module whose import has begun. Python writes there that it has ended, and this calls back."""

    waiting: list[Callback]

    @property
    def _initializing(self) -> bool:
        return bool(vars(self)["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        vars(self)["_initializing"] = value
        module = sys.modules.get(self.name)
        if value or module is None:  # it is not there where its import has failed
            return
        try:
            while self.waiting:
                self.waiting.pop(0)(module)
        except BaseException:  # as where a loader raises: a module that was not finished is not kept
            sys.modules.pop(self.name, None)
            raise


class _Finder(MetaPathFinder):
    """Finds ``name`` by the other finders and wraps its loader; leaves sys.meta_path once the module was executed.

    Finding alone does not remove it: many packages only check whether another is installed.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self._name = name
        self._callback = callback
        self._searching = False

    def is_for(self, name: str, callback: Callback) -> bool:
        return (self._name, self._callback) == (name, callback)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._run_callback)
        return spec

    def _run_callback(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self._callback(module)


class _Loader(Loader):
    """Loads as the wrapped loader does, then calls back. Every other attribute is the wrapped loader's."""

    def __init__(self, wrapped: Loader, callback: Callback) -> None:
        self._wrapped = wrapped
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._wrapped.exec_module(module)
        self._callback(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
