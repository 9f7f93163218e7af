"""A starting worker and memory that another process still holds, as that of a worker that has just ended."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.mem_utils import MemorySnapshot
from vllm_ascend.worker import worker

from vllm_ray_ascend.executor import memory_wait

LIMIT_S = "60"
HOLDER = """
import torch, torch_npu
torch.npu.set_device(0)
held = torch.zeros(int(0.8 * torch.npu.mem_get_info(0)[1]), dtype=torch.uint8, device="npu:0")
print("holding", flush=True)
input()
"""


class ReleaseWhenWarned(logging.Handler):
    """Kills the process that holds the memory once a worker says that it waits."""

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        super().__init__()
        self.holder = holder
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())
        self.holder.kill()


@pytest.fixture
def holder() -> Iterator[ReleaseWhenWarned]:
    torch.npu.set_device(0)
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    handler = ReleaseWhenWarned(process)
    try:
        assert process.stdout is not None and "holding\n" in iter(process.stdout.readline, "")
        memory_wait.logger.addHandler(handler)
        yield handler
    finally:
        memory_wait.logger.removeHandler(handler)
        subprocess.Popen.kill(process)
        process.communicate()


@pytest.fixture
def config() -> Iterator[None]:
    found = VllmConfig()
    found.cache_config = SimpleNamespace(gpu_memory_utilization=0.9)
    with set_current_vllm_config(found):
        yield


def is_short(snapshot: Any) -> bool:
    return bool(snapshot.free_memory < 0.9 * snapshot.total_memory)


def test_a_worker_waits_for_memory_that_is_about_to_be_free(
    holder: ReleaseWhenWarned, config: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vllm-ascend's worker measures it; else it ends with "Free memory on device ... is less than desired"."""
    monkeypatch.setenv("VLLM_RAY_ASCEND_NPU_WAIT_S", LIMIT_S)
    memory_wait.install()
    assert is_short(MemorySnapshot(device="npu:0"))
    snapshot = worker.MemorySnapshot(device="npu:0")
    assert isinstance(snapshot, MemorySnapshot) and not is_short(snapshot)
    (warning,) = holder.warnings
    assert "VRA-372" in warning and "--gpu-memory-utilization 0.9" in warning and f"up to {LIMIT_S} s" in warning


@pytest.mark.parametrize("limit_s", ["0", "0.1"])
def test_memory_that_stays_taken_is_reported_as_it_is(
    holder: ReleaseWhenWarned, config: None, monkeypatch: pytest.MonkeyPatch, limit_s: str
) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_NPU_WAIT_S", limit_s)
    monkeypatch.setattr(holder.holder, "kill", lambda: None)
    assert is_short(memory_wait.with_memory_wait(MemorySnapshot)(device="npu:0"))
    assert len(holder.warnings) == (limit_s != "0")
