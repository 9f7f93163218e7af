"""Who owns which NPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.owners import Claim, check_assigned_ids, check_claims
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

NODE = "10.77.0.2"
CLAIMS = st.lists(
    st.builds(
        Claim,
        owner=st.sampled_from("ABCDE"),
        address=st.sampled_from(["10.77.0.1", NODE]),
        physical_id=st.integers(0, 7),
    )
)


@given(CLAIMS)
def test_every_double_owner_is_found_and_named(claims: list[Claim]) -> None:
    owners = Counter((claim.address, claim.physical_id) for claim in set(claims))
    doubled = [npu for npu, count in owners.items() if count > 1]
    if not doubled:
        check_claims(claims)
        return
    with pytest.raises(DeviceMappingError) as raised:
        check_claims(claims)
    message = str(raised.value)
    for address, physical_id in doubled:
        part = message.partition(f"NPU {physical_id} of node {address}: ")[2].partition(".")[0].partition(";")[0]
        assert set(part.split(" and ")) == {
            claim.owner for claim in claims if (claim.address, claim.physical_id) == (address, physical_id)
        }
    assert message.count(" of node ") == len(doubled)


@given(st.integers(1, 30), st.integers(1, 10_000))
def test_npus_are_shared_as_far_as_shares_fit(owners: int, ten_thousandths: int) -> None:
    share = ten_thousandths / 10_000
    claims = [Claim(f"engine {number}", NODE, 0, share) for number in range(owners)]
    if owners * ten_thousandths <= 10_000:
        check_claims(claims)
    else:
        with pytest.raises(DeviceMappingError):
            check_claims(claims)


def test_repeated_claims_of_one_owner_count_once() -> None:
    check_claims([Claim("A", NODE, 0), Claim("A", NODE, 0), Claim("A", NODE, 1), Claim("B", "10.77.0.1", 0)])


def test_the_errors_of_claims() -> None:
    with pytest.raises(DeviceMappingError) as whole:
        check_claims([Claim("rank 0 of engine A", NODE, 4), Claim("rank 1 of engine B", NODE, 4)])
    assert str(whole.value) == (
        "VRA-248: NPUs with more than one owner: NPU 4 of node 10.77.0.2: rank 0 of engine A and rank 1 of engine B. "
        "Stop all but one (`vllm-ray-ascend topology` shows them). Check that each of these nodes runs one Ray only, "
        "started with no more NPUs than its ASCEND_RT_VISIBLE_DEVICES has. To share an NPU on purpose, start every "
        "owner with VLLM_RAY_PER_WORKER_GPUS=0.5."
    )
    with pytest.raises(DeviceMappingError) as parts:
        check_claims([Claim("A", NODE, 4, 0.5), Claim("B", NODE, 4, 0.5), Claim("C", NODE, 4, 0.25)])
    assert "NPU 4 of node 10.77.0.2: A (0.5 of it) and B (0.5 of it) and C (0.25 of it). " in str(parts.value)
    assert str(parts.value).endswith("start every owner with VLLM_RAY_PER_WORKER_GPUS=0.3333.")


@pytest.mark.parametrize(
    ("assigned_ids", "requested", "usable_ids", "expected"),
    [
        (["4"], 1, [4, 5, 6, 7], [4]),
        ([4], 0.5, None, [4]),
        (["5", "4"], 2, [4, 5], [5, 4]),
        (["4", "5"], 1.5, [4, 5], [4, 5]),
    ],
)
def test_what_ray_assigned(
    assigned_ids: Sequence[int | str], requested: float, usable_ids: Sequence[int] | None, expected: list[int]
) -> None:
    assert check_assigned_ids("rank 1", assigned_ids, requested, usable_ids, NODE) == expected


@pytest.mark.parametrize(
    ("assigned_ids", "requested", "usable_ids", "expected"),
    [
        pytest.param(
            ["11", "5", "4"],
            1,
            [4, 5, 11],
            "VRA-250: Ray assigned NPUs 4,5,11 to rank 1 on node 10.77.0.2, which requested 1: the node declares more "
            "NPUs to Ray than its ASCEND_RT_VISIBLE_DEVICES has, and Ray then hands out the whole list. On that node "
            "`ray "
            """stop`, then `ASCEND_RT_VISIBLE_DEVICES=4,5,11 ray start ... --resources='{"NPU": 3}'`.""",
            id="the whole list",
        ),
        pytest.param(
            [],
            1,
            None,
            "VRA-249: Ray assigned no NPU to rank 1 on node 10.77.0.2, which requested 1. Leave "
            "VLLM_RAY_PER_WORKER_GPUS above 0, and on that node `ray stop`, unset ASCEND_RT_VISIBLE_DEVICES, then "
            """`ray start ... --resources='{"NPU": N}'` with the N of `npu-smi info`.""",
            id="none",
        ),
        pytest.param(
            ["4"],
            1.5,
            None,
            "VRA-249: Ray assigned only NPUs 4 to rank 1 on node 10.77.0.2, which requested 1.5. Leave "
            "VLLM_RAY_PER_WORKER_GPUS above 0, and on that node `ray stop`, unset ASCEND_RT_VISIBLE_DEVICES, then "
            """`ray start ... --resources='{"NPU": N}'` with the N of `npu-smi info`.""",
            id="too few",
        ),
        pytest.param(
            ["9"],
            1,
            [0, 1, 2, 3],
            "VRA-251: Ray assigned NPU '9' to rank 1 on node 10.77.0.2, which has NPUs 0,1,2,3. Ray was started there "
            "with a wrong ASCEND_RT_VISIBLE_DEVICES or a wrong number of NPUs. On that node `ray stop`, then "
            "`ASCEND_RT_VISIBLE_DEVICES=0,1,2,3 ray start ...`.",
            id="not there",
        ),
        pytest.param(
            ["0"],
            1,
            [],
            "VRA-251: Ray assigned NPU '0' to rank 1 on node 10.77.0.2, which has no NPU. Ray was started there with a "
            "wrong ASCEND_RT_VISIBLE_DEVICES or a wrong number of NPUs. On that node `ray stop`, then `ray start ...`.",
            id="on a node without NPUs",
        ),
        pytest.param(
            [""],
            1,
            None,
            "VRA-251: Ray assigned NPU '' to rank 1 on node 10.77.0.2. Ray was started there with a wrong "
            "ASCEND_RT_VISIBLE_DEVICES or a wrong number of NPUs. On that node `ray stop`, then `ray start ...`.",
            id="no number, of the list '4,'",
        ),
    ],
)
def test_the_errors_of_what_ray_assigned(
    assigned_ids: Sequence[int | str], requested: float, usable_ids: Sequence[int] | None, expected: str
) -> None:
    with pytest.raises(DeviceMappingError) as raised:
        check_assigned_ids("rank 1", assigned_ids, requested, usable_ids, NODE)
    assert str(raised.value) == expected


@given(st.lists(st.integers(0, 15), unique=True, min_size=1), st.floats(0.0625, 8), st.lists(st.integers(0, 15)))
def test_accepted_ids_are_assigned_requested_and_usable(
    assigned_ids: list[int], requested: float, usable_ids: list[int]
) -> None:
    try:
        taken = check_assigned_ids("rank 1", [str(each) for each in assigned_ids], requested, usable_ids, NODE)
    except DeviceMappingError:
        assert not requested <= len(assigned_ids) < requested + 1 or not set(assigned_ids) <= set(usable_ids)
    else:
        assert taken == assigned_ids and requested <= len(assigned_ids) < requested + 1
        assert set(assigned_ids) <= set(usable_ids)


def test_containers_of_one_host_have_numberings_of_their_own() -> None:
    """Their nodes have one address and two ids: NPU 0 of each is another NPU; NPU 0 of one of them is not."""
    mine = Claim("engine a", "10.0.0.1", 0, node_id="n1")
    check_claims([mine, replace(mine, owner="engine b", node_id="n2")])
    with pytest.raises(DeviceMappingError, match=r"NPU 0 of node 10.0.0.1: engine a and engine b"):
        check_claims([mine, replace(mine, owner="engine b")])
