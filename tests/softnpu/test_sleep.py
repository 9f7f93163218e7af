"""vllm-ascend's CaMemAllocator on the software NPU: memory that is released and allocated again at the same address."""

from __future__ import annotations

import gc

import pytest
import torch
from vllm_ascend.device_allocator.camem import CaMemAllocator

MIB = 1 << 20


@pytest.fixture(autouse=True)
def device() -> None:
    torch.npu.set_device(0)


def free_mib() -> int:
    torch.npu.synchronize()
    return int(torch.npu.mem_get_info(0)[0]) // MIB


def test_offloaded_memory_is_restored_and_the_rest_is_discarded() -> None:
    allocator = CaMemAllocator.get_instance()
    before = free_mib()
    with allocator.use_memory_pool("weights"):
        weights = torch.arange(8 * MIB, dtype=torch.float32, device="npu")
    with allocator.use_memory_pool("kv_cache"):
        cache = torch.ones(16 * MIB, dtype=torch.uint8, device="npu")
    addresses = weights.data_ptr(), cache.data_ptr()
    held = before - free_mib()
    assert held >= 48 and allocator.get_current_usage() >= 48 * MIB

    graph = torch.npu.NPUGraph()
    with torch.inference_mode(), torch.npu.graph(graph):
        total = weights[:4].sum()
    outside = before - held - free_mib()  # the graph's own

    for _ in range(2):
        allocator.sleep(offload_tags="weights")
        assert before - free_mib() - outside < held - 40
        allocator.wake_up(["weights"])
        assert torch.equal(weights.cpu(), torch.arange(8 * MIB, dtype=torch.float32))
        allocator.wake_up(["kv_cache"])
        cache.fill_(7)
        assert set(cache.cpu().unique().tolist()) == {7}
    assert (weights.data_ptr(), cache.data_ptr()) == addresses
    weights.add_(1)
    graph.replay()
    torch.npu.synchronize()
    assert total.item() == 1 + 2 + 3 + 4  # captured before the sleep: the address is the same

    del weights, cache, graph, total
    allocator.allocator_and_pools.clear()
    gc.collect()
    torch.npu.empty_cache()


def test_more_memory_than_there_is_raises_out_of_memory() -> None:
    with CaMemAllocator.get_instance().use_memory_pool("weights"), pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1 << 40, dtype=torch.uint8, device="npu")
