"""Checks of what patches/vllm-ascend fixes, run against the vllm-ascend on the path; one for each patch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import vllm.v1.engine.core
import vllm_ascend.patch.platform.patch_dp_device_ids as device_ids
from vllm_ascend.distributed.eplb import eplb_state

from tests.patches.report import run
from tests.softnpu.test_pipeline_scheduling import create_scheduler, max_decodes_in_flight


def device_ids_in_the_engine_core() -> None:
    ours = device_ids._patched_get_physical_gpu_ids_for_local_dp_rank
    assert vllm.v1.engine.core.get_physical_gpu_ids_for_local_dp_rank is ours


def fence() -> None:
    with create_scheduler() as scheduler:
        assert max_decodes_in_flight(scheduler) == 1


def routing_tables() -> None:
    """Two ranks, of two experts with two replicas each, choose the same replica of a token's expert."""
    replicas, counts = torch.tensor([[[0, 2], [1, 3]]]), torch.tensor([[2, 2]])
    tables = []
    for rank in (0, 1):
        group = SimpleNamespace(rank_in_group=rank, world_size=2)
        eplb_state.get_ep_group = lambda group=group: group
        state = eplb_state.AscendEplbLayerState()
        state.set_layer_state(0, torch.zeros(1, 4), replicas, counts)
        tables.append(state.expert_replica_routing_table)
    assert torch.equal(*tables)


if __name__ == "__main__":
    run(
        {
            "vllm-ascend-0001": device_ids_in_the_engine_core,
            "vllm-ascend-0002": fence,
            "vllm-ascend-0003": routing_tables,
        }
    )
