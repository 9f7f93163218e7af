"""Tensors between NPUs under Ray, by HCCL. `register` is all that a Ray program needs."""

from __future__ import annotations


def register() -> None:
    """Let the compiled graphs of this driver move NPU tensors by HCCL: see docs/transport.md."""
    from vllm_ray_ascend.transport.tensors import register as in_ray

    in_ray()
