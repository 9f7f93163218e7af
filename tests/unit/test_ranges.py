"""The NPUs of a data parallel rank on its own node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.ranges import RankRequest, physical_ids_of_rank
from vllm_ray_ascend.devices.visible import format_ids
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

EIGHT = "0,1,2,3,4,5,6,7"


def request(rank: int, world_size: int, visible_devices: str | None = None, **more: object) -> RankRequest:
    """A rank that lies on its node whole, unless ``more`` says otherwise."""
    base = RankRequest(
        local_dp_rank=rank, world_size=world_size, local_world_size=world_size, visible_devices=visible_devices
    )
    return replace(base, **more)  # type: ignore[arg-type]


def error_text(asked: RankRequest) -> str:
    with pytest.raises(DeviceMappingError) as raised:
        physical_ids_of_rank(asked)
    return str(raised.value)


@st.composite
def nodes(draw: st.DrawFn) -> tuple[RankRequest, list[int]]:
    """A request as rank 0 of a node, by any of the three ways in which NPUs are offered, and what is offered."""
    count = draw(st.integers(1, 16))
    numbers = draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1))
    way = draw(st.sampled_from(["list", "device ids", "count"]))
    tensor, pipeline, context, parts = (draw(st.integers(1, 3)) for _ in range(4))
    asked = RankRequest(
        local_dp_rank=0,
        world_size=tensor * pipeline * context * parts,
        local_world_size=tensor * pipeline * context,
        visible_devices=format_ids(numbers)
        if way == "list"
        else draw(st.sampled_from(["", "15", None]))
        if way != "count"
        else None,
        requested_physical_ids=numbers if way == "device ids" else None,
        npu_count=count if way == "count" else draw(st.sampled_from([count, None])),
        ranks_in_process=draw(st.sampled_from([None, 2, 16])),
    )
    return asked, list(range(count)) if way == "count" else numbers


@given(nodes())
def test_ranks_take_their_node_in_order_and_never_share(drawn: tuple[RankRequest, list[int]]) -> None:
    asked, offered = drawn
    fitting = len(offered) // asked.local_world_size
    taken = [npu for rank in range(fitting) for npu in physical_ids_of_rank(replace(asked, local_dp_rank=rank))]
    assert taken == offered[: fitting * asked.local_world_size]
    assert len(set(taken)) == len(taken)


@given(nodes(), st.integers(0, 20))
def test_a_rank_that_does_not_fit_is_an_error(drawn: tuple[RankRequest, list[int]], beyond: int) -> None:
    asked, offered = drawn
    fitting = len(offered) // asked.local_world_size
    message = error_text(replace(asked, local_dp_rank=fitting + beyond))
    assert (f"--data-parallel-size-local {fitting}," in message) == (fitting > 0)


@given(nodes())
def test_the_rank_of_a_process_that_hosts_no_other_may_have_a_list_of_its_own(
    drawn: tuple[RankRequest, list[int]],
) -> None:
    asked, offered = drawn
    if asked.visible_devices or asked.requested_physical_ids:
        cut = replace(
            asked,
            local_dp_rank=5,
            world_size=len(offered),
            local_world_size=len(offered),
            ranks_in_process=1,
        )
        assert physical_ids_of_rank(cut) == offered


@given(st.integers(0, 8), st.integers(1, 8))
def test_without_a_list_and_a_count_ranks_follow_each_other(rank: int, world_size: int) -> None:
    start = rank * world_size
    assert physical_ids_of_rank(request(rank, world_size)) == list(range(start, start + world_size))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(request(1, 4, EIGHT), [4, 5, 6, 7], id="list of the node"),
        pytest.param(request(1, 2, "7,3,5,1"), [5, 1], id="order of the list"),
        pytest.param(request(1, 2, " ", npu_count=4), [2, 3], id="blank list, as good as none"),
        pytest.param(request(1, 2, npu_count=4), [2, 3], id="no list"),
        pytest.param(request(3, 2, "6,7", ranks_in_process=1), [6, 7], id="list cut for the rank"),
        pytest.param(
            request(1, 2, "4,5,6,7", ranks_in_process=1), [6, 7], id="list of the node, one rank in the process"
        ),
        pytest.param(request(1, 2, EIGHT, requested_physical_ids=(6, 4, 2, 0)), [2, 0], id="--device-ids"),
        pytest.param(request(0, 16, EIGHT, local_world_size=8), [0, 1, 2, 3, 4, 5, 6, 7], id="rank over two nodes"),
        pytest.param(request(1, 8, EIGHT, local_world_size=4), [4, 5, 6, 7], id="two ranks over two nodes"),
        pytest.param(request(1, 2 * 2 * 2, npu_count=16), [8, 9, 10, 11, 12, 13, 14, 15], id="TP 2 x PP 2 x PCP 2"),
        pytest.param(request(0, 2, "0,1,9", npu_count=8), [0, 1], id="the invalid entry comes after"),
    ],
)
def test_ranges(asked: RankRequest, expected: list[int]) -> None:
    assert physical_ids_of_rank(asked) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(
            request(2, 4, EIGHT),
            "VRA-254: Data parallel rank 2 of this node needs its NPUs [8, 12), but "
            "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 has 8. Run fewer ranks on this node: --data-parallel-size-local "
            "2, or name at least 12 NPUs of the node in ASCEND_RT_VISIBLE_DEVICES, or unset it.",
            id="vllm-ascend #2879",
        ),
        pytest.param(
            request(1, 2, "4,5", ranks_in_process=2),
            "VRA-254: Data parallel rank 1 of this node needs its NPUs [2, 4), but ASCEND_RT_VISIBLE_DEVICES=4,5 has "
            "2. Run fewer ranks on this node: --data-parallel-size-local 1, or name at least 4 NPUs of the node in "
            "ASCEND_RT_VISIBLE_DEVICES, or unset it.",
            id="vllm-ascend's patch gives both ranks the same NPUs",
        ),
        pytest.param(
            request(1, 2, "0,1,9,3", npu_count=8),
            "VRA-254: Data parallel rank 1 of this node needs its NPUs [2, 4), but ASCEND_RT_VISIBLE_DEVICES=0,1,9,3 "
            "has 2, because it names NPU '9', which does not exist. Run fewer ranks on this node: "
            "--data-parallel-size-local 1, or name at least 4 NPUs of the node in ASCEND_RT_VISIBLE_DEVICES, or unset "
            "it.",
            id="a wrong list",
        ),
        pytest.param(
            request(1, 2, "4,5,9", npu_count=8, ranks_in_process=1),
            "VRA-254: Data parallel rank 1 of this node needs its NPUs [2, 4), but ASCEND_RT_VISIBLE_DEVICES=4,5,9 has "
            "2, because it names NPU '9', which does not exist. Run fewer ranks on this node: "
            "--data-parallel-size-local 1, or name at least 4 NPUs of the node in ASCEND_RT_VISIBLE_DEVICES, or unset "
            "it.",
            id="a wrong list is not one that was cut",
        ),
        pytest.param(
            request(1, 2, requested_physical_ids=[4, 5, 4]),
            "VRA-254: Data parallel rank 1 of this node needs its NPUs [2, 4), but --device-ids 4,5,4 has 2, because "
            "it names NPU 4 twice. Run fewer ranks on this node: --data-parallel-size-local 1, or name at least 4 NPUs "
            "in --device-ids.",
            id="--device-ids",
        ),
        pytest.param(
            request(0, 16, npu_count=8, ranks_in_process=1),
            "VRA-254: Data parallel rank 0 of this node needs its NPUs [0, 16), but the node (without "
            "ASCEND_RT_VISIBLE_DEVICES) has 8. Make the rank smaller with --tensor-parallel-size or "
            "--pipeline-parallel-size, let it span nodes with --data-parallel-backend ray and "
            "VLLM_RAY_DP_PACK_STRATEGY=span, or use a node with at least 16 NPUs.",
            id="a rank larger than the node",
        ),
        pytest.param(
            request(-1, 2, EIGHT),
            "VRA-252: Data parallel ranks of a node count from 0, this one has -1. Set VLLM_DP_RANK_LOCAL to the "
            "rank's number among those of its node.",
            id="negative rank",
        ),
        pytest.param(
            request(0, 2, EIGHT, local_world_size=4),
            "VRA-253: A data parallel rank of 2 NPUs cannot have 4 of them on this node. Check --tensor-parallel-size, "
            "--pipeline-parallel-size and --nnodes.",
            id="a part larger than the whole",
        ),
    ],
)
def test_the_errors(asked: RankRequest, expected: str) -> None:
    assert error_text(asked) == expected
