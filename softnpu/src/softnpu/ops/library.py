"""The kernels of the npu device: the compiled module, and the registration of Python functions as kernels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

Kernel = TypeVar("Kernel", bound=Callable[..., object])


@cache
def load_extension() -> ModuleType:
    """Load the compiled module of kernels (csrc/ops/module.cpp), once."""
    path = Path(os.environ["SOFTNPU_LIB"]) / "_softnpu_ops.so"
    spec = importlib.util.spec_from_file_location("_softnpu_ops", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded. Build it again: softnpu build")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class KernelRegistry:
    """The kernels that one file adds to a namespace. ``names`` lists them, overloads as ``name.overload``."""

    def __init__(self, namespace: str) -> None:
        self._library = torch.library.Library(namespace, "IMPL")
        self.names: set[str] = set()

    def add(self, name: str) -> Callable[[Kernel], Kernel]:
        """Register the decorated function as the kernel of operator ``name``."""

        def register(kernel: Kernel) -> Kernel:
            self._library.impl(name, kernel, "PrivateUse1", allow_override=True)
            self.names.add(name)
            return kernel

        return register
