"""Run by Python at start under `vllm-ray-ascend softnpu exec`: waits for torch_npu, and puts the kernels behind it."""

import importlib.machinery
import importlib.util
import os
import sys


def run_next_sitecustomize() -> None:
    """Runs the sitecustomize that this one hides, if there is one."""
    here = os.path.dirname(__file__)
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


run_next_sitecustomize()
if importlib.util.find_spec("vllm_ray_ascend") is not None:  # another Python than the one that was activated has none
    from vllm_ray_ascend.softnpu.ops import hooks

    hooks.install()
