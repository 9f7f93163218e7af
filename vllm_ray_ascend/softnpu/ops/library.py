"""Registers Python functions as kernels of the npu device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Kernel = TypeVar("Kernel", bound=Callable[..., object])


class Kernels:
    """The kernels that one file adds to a namespace. `names` says which, overloads as `name.overload`."""

    def __init__(self, namespace: str) -> None:
        self._library = torch.library.Library(namespace, "IMPL")
        self.names: set[str] = set()

    def add(self, name: str) -> Callable[[Kernel], Kernel]:
        """Decorates the kernel of operator `name`."""

        def register(kernel: Kernel) -> Kernel:
            self._library.impl(name, kernel, "PrivateUse1", allow_override=True)
            self.names.add(name)
            return kernel

        return register
