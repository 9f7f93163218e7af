"""Tensors between NPUs under Ray, by HCCL. `register` is all that a Ray program needs."""

from __future__ import annotations


def register() -> None:
    """Let the compiled graphs of this driver move NPU tensors by HCCL: see docs/transport.md."""
    from vllm_ray_ascend.ray_transport import registration  # imports Ray

    registration.register()
