"""Stateless groups on NPUs, the movement of experts in them, and the references for vllm-ascend's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.softnpu.ranks import run_ranks, succeeded

pytestmark = pytest.mark.softnpu


@pytest.mark.parametrize("scenario", ["groups_of_two_sizes", "late_rank", "experts_move"])
def test_three_ranks(tmp_path: Path, scenario: str) -> None:
    succeeded(run_ranks("elastic_worker", scenario, 3, tmp_path))


def test_a_rank_without_links_leaves_the_others_serving(tmp_path: Path) -> None:
    variables = {"SOFTNPU_FAULTS": "link_setup:rank=2,op=AllReduce,code=9", "SOFTNPU_CONNECT_TIMEOUT": "6"}
    succeeded(run_ranks("elastic_worker", "rank_without_links", 3, tmp_path, variables))


@pytest.mark.parametrize("tokens", [1, 7, 1030])
def test_replicas_are_chosen_as_on_the_cpu(tokens: int) -> None:
    from softnpu.ops.triton import map_to_physical
    from vllm_ascend.ops.fused_moe import eplb

    generator = torch.Generator().manual_seed(tokens)
    table = torch.randint(0, 16, (1024, 8), generator=generator, dtype=torch.int32)
    experts = torch.randint(0, 8, (tokens, 2), generator=generator, dtype=torch.int32)
    expected = eplb.map_to_physical(experts, table)
    assert torch.equal(map_to_physical(experts.npu(), table.npu()).cpu(), expected)
    assert torch.equal(torch.ops.vllm.ascend_eplb_map_to_physical(experts.npu(), table.npu()).cpu(), expected)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("group_list_type", [0, 1])
def test_load_is_recorded_as_on_the_cpu(group_list_type: int, enabled: bool) -> None:
    from vllm_ascend.ops.fused_moe import eplb

    tokens, switch = torch.tensor([1, 4, 4, 9]), torch.tensor(enabled)
    loads = [torch.arange(10, dtype=torch.int32), torch.arange(10, dtype=torch.int32).npu()]
    eplb.record_expert_tokens(tokens, loads[0], switch, group_list_type, 3)
    torch.ops.vllm.ascend_eplb_record_expert_tokens(tokens.npu(), loads[1], switch.npu(), group_list_type, 3)
    assert torch.equal(loads[1].cpu(), loads[0]) and bool(loads[0].sum() > 45) is enabled
