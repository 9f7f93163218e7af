"""Run by Python at its start under `softnpu exec`: registers hooks that install the kernels with torch_npu."""

import importlib.machinery
import importlib.util
import os
import sys


def run_next_sitecustomize() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    here = os.path.dirname(__file__)
    other_paths = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", other_paths)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def install_hooks() -> None:
    """Install the import hooks, unless this is a Python in which softnpu is not installed."""
    try:
        from softnpu.ops import hooks
    except ModuleNotFoundError as error:
        if error.name not in ("softnpu", "softnpu.ops"):
            raise
    else:
        hooks.install_hooks()


run_next_sitecustomize()
install_hooks()
