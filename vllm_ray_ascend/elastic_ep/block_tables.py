"""A fix of vllm-ascend's block tables, which cannot be cleared: AttributeError. Scaling clears and restores them."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend import patches


def install() -> None:
    """Make BlockTable.clear work in this process."""
    patches.apply("vllm_ascend.worker.block_table.BlockTable.clear", _clear)


def _clear(table: Any) -> None:
    table.block_table.gpu.fill_(0)
    table.block_table.cpu.fill_(0)
