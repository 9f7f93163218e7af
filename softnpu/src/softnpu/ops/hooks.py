"""Import hooks: install the kernels with torch_npu, and references for code that CANN compiles on real NPUs."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from softnpu.import_hook import call_when_imported

Action = Callable[[ModuleType], None]


class SubstituteFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Provides modules that exist only where CANN compiled them: executing one runs its action."""

    def __init__(self, actions: dict[str, Action]) -> None:
        self.actions = actions

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in self.actions else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.actions[module.__name__](module)


class MissingKernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Provides packages of NPU kernels that vllm-ascend imports, used or not: every kernel raises when it is called."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def missing_kernel(attribute: str) -> Callable[..., None]:
            if attribute.startswith("__"):
                raise AttributeError(attribute)

            def kernel(*args: object, **kwargs: object) -> None:
                raise NotImplementedError(f"the software NPU has no kernel {module.__name__}.{attribute}")

            return kernel

        module.__getattr__ = missing_kernel  # type: ignore[method-assign]


def _install_kernels(module: ModuleType) -> None:
    from multiprocessing import util

    from softnpu.ops import kernels

    kernels.install_kernels()
    util.register_after_fork(_leave_node, _leave_node_at_exit)


def _leave_node() -> None:
    import ctypes

    ctypes.CDLL(str(Path(os.environ["SOFTNPU_LIB"]) / "libascendcl.so")).softnpu_leave_node()


def _leave_node_at_exit(leave: Callable[[], None]) -> None:
    from multiprocessing import util

    # A forked child of multiprocessing exits without C's exit functions, in which other processes leave the node.
    util.Finalize(None, leave, exitpriority=-100)


def _install_ascend_c(module: ModuleType) -> None:
    from softnpu.ops import ascend_c

    ascend_c.install_operators(module)


def _reject_meta_import(module: ModuleType) -> None:
    raise ImportError("vllm-ascend's own operators are not compiled for the software NPU")


def _replace_triton_kernels(module: ModuleType) -> None:
    from softnpu.ops import triton

    triton.replace_kernels(module)


def _disable_triton(module: ModuleType) -> None:
    """Make vLLM see no Triton. It may be installed for GPUs, and vLLM takes it as usable where GPUs are hidden."""
    module.HAS_TRITON = False  # type: ignore[attr-defined]


def _install_atb(module: ModuleType) -> None:
    from softnpu.ops import atb

    atb.install_after_registration(module)


def install_hooks() -> None:
    """Put the hooks in front of Python's own finders. They cost nothing until one of the modules is imported."""
    call_when_imported("torch_npu", _install_kernels)
    call_when_imported("torch_npu.op_plugin.atb._atb_ops", _install_atb)
    for module in ("vllm_ascend.worker.block_table", "vllm_ascend.ops.triton.eplb"):
        call_when_imported(module, _replace_triton_kernels)
    call_when_imported("vllm.triton_utils.importing", _disable_triton)
    sys.meta_path[:0] = [
        SubstituteFinder(
            {"vllm_ascend.vllm_ascend_C": _install_ascend_c, "vllm_ascend.meta_registration": _reject_meta_import}
        ),
        MissingKernelFinder({"fla_npu"}),
    ]
