"""What is done when other packages are imported: kernels behind torch_npu, references for what real NPUs compile."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from vllm_ray_ascend.compat.import_hook import when_imported

Action = Callable[[ModuleType], None]


class Substitute(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for modules that exist only where CANN compiled them: executing one runs its action."""

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


class MissingKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages of NPU kernels that vllm-ascend imports, used or not: what is called raises."""

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


def _kernels(module: ModuleType) -> None:
    from multiprocessing import util

    from vllm_ray_ascend.softnpu.ops import kernels

    kernels.install()
    util.register_after_fork(_leave_node, _leave_at_end)


def _leave_node() -> None:
    import ctypes

    ctypes.CDLL(str(Path(os.environ["SOFTNPU_LIB"]) / "libascendcl.so")).softnpu_leave_node()


def _leave_at_end(leave: Callable[[], None]) -> None:
    from multiprocessing import util

    # A forked child of multiprocessing ends without C's exit functions, with which other processes leave the node.
    util.Finalize(None, leave, exitpriority=-100)


def _ascend_c(module: ModuleType) -> None:
    from vllm_ray_ascend.softnpu.ops import ascend_c

    ascend_c.install(module)


def _no_meta(module: ModuleType) -> None:
    raise ImportError("vllm-ascend's own operators are not compiled for the software NPU")


def _triton(module: ModuleType) -> None:
    from vllm_ray_ascend.softnpu.ops import triton

    triton.replace(module)


def _no_triton(module: ModuleType) -> None:
    """Triton may be installed for GPUs: where GPUs are hidden, as in Ray's actors, vLLM takes it to be usable."""
    module.HAS_TRITON = False  # type: ignore[attr-defined]


def _atb(module: ModuleType) -> None:
    from vllm_ray_ascend.softnpu.ops import atb

    atb.install_after_registration(module)


def install() -> None:
    """Puts the hooks in front of Python's own finders. Costs nothing until one of the modules is imported."""
    when_imported("torch_npu", _kernels)
    when_imported("torch_npu.op_plugin.atb._atb_ops", _atb)
    when_imported("vllm_ascend.worker.block_table", _triton)
    when_imported("vllm.triton_utils.importing", _no_triton)
    sys.meta_path[:0] = [
        Substitute({"vllm_ascend.vllm_ascend_C": _ascend_c, "vllm_ascend.meta_registration": _no_meta}),
        MissingKernels({"fla_npu"}),
    ]
