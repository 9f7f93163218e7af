"""Who owns which NPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.owners import Claim, check_assigned, check_claims
from vllm_ray_ascend.errors import DeviceMappingError

pytestmark = pytest.mark.unit

NODE = "10.77.0.2"
CLAIMS = st.lists(
    st.builds(
        Claim,
        owner=st.sampled_from("ABCDE"),
        address=st.sampled_from(["10.77.0.1", NODE]),
        physical=st.integers(0, 7),
    )
)


@given(CLAIMS)
def test_every_double_owner_is_found_and_named(claims: list[Claim]) -> None:
    owners = Counter((claim.address, claim.physical) for claim in set(claims))
    doubled = [npu for npu, count in owners.items() if count > 1]
    if not doubled:
        check_claims(claims)
        return
    with pytest.raises(DeviceMappingError) as raised:
        check_claims(claims)
    message = str(raised.value)
    for address, physical in doubled:
        part = message.partition(f"NPU {physical} of node {address}: ")[2].partition(".")[0].partition(";")[0]
        assert set(part.split(" and ")) == {
            claim.owner for claim in claims if (claim.address, claim.physical) == (address, physical)
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


def test_one_owner_may_say_twice_what_it_has() -> None:
    check_claims([Claim("A", NODE, 0), Claim("A", NODE, 0), Claim("A", NODE, 1), Claim("B", "10.77.0.1", 0)])


def test_the_errors_of_claims() -> None:
    with pytest.raises(DeviceMappingError) as whole:
        check_claims([Claim("rank 0 of engine A", NODE, 4), Claim("rank 1 of engine B", NODE, 4)])
    assert str(whole.value) == (
        "NPUs with more than one owner: NPU 4 of node 10.77.0.2: rank 0 of engine A and rank 1 of engine B. Stop all "
        "but one (`vllm-ray-ascend topology` shows them). See that each of these nodes runs one Ray only, started with "
        "no more NPUs than its ASCEND_RT_VISIBLE_DEVICES has. To share an NPU on purpose, start every owner with "
        "VLLM_RAY_PER_WORKER_GPUS=0.5."
    )
    with pytest.raises(DeviceMappingError) as parts:
        check_claims([Claim("A", NODE, 4, 0.5), Claim("B", NODE, 4, 0.5), Claim("C", NODE, 4, 0.25)])
    assert "NPU 4 of node 10.77.0.2: A (0.5 of it) and B (0.5 of it) and C (0.25 of it). " in str(parts.value)
    assert str(parts.value).endswith("start every owner with VLLM_RAY_PER_WORKER_GPUS=0.3333.")


@pytest.mark.parametrize(
    ("ids", "wanted", "usable", "expected"),
    [
        (["4"], 1, [4, 5, 6, 7], [4]),
        ([4], 0.5, None, [4]),
        (["5", "4"], 2, [4, 5], [5, 4]),
        (["4", "5"], 1.5, [4, 5], [4, 5]),
    ],
)
def test_what_ray_assigned(
    ids: Sequence[int | str], wanted: float, usable: Sequence[int] | None, expected: list[int]
) -> None:
    assert check_assigned("rank 1", ids, wanted, usable, NODE) == expected


@pytest.mark.parametrize(
    ("ids", "wanted", "usable", "expected"),
    [
        pytest.param(
            ["11", "5", "4"],
            1,
            [4, 5, 11],
            "Ray assigned NPUs 4,5,11 to rank 1 on node 10.77.0.2, which asked for 1: the node declares more NPUs to "
            "Ray than its ASCEND_RT_VISIBLE_DEVICES has, and Ray then hands out the whole list. On that node `ray "
            """stop`, then `ASCEND_RT_VISIBLE_DEVICES=4,5,11 ray start ... --resources='{"NPU": 3}'`.""",
            id="the whole list",
        ),
        pytest.param(
            [],
            1,
            None,
            "Ray assigned no NPU to rank 1 on node 10.77.0.2, which asked for 1. Leave VLLM_RAY_PER_WORKER_GPUS above "
            "0, and on that node `ray stop`, unset ASCEND_RT_VISIBLE_DEVICES, then "
            """`ray start ... --resources='{"NPU": N}'` with the N of `npu-smi info`.""",
            id="none",
        ),
        pytest.param(
            ["4"],
            1.5,
            None,
            "Ray assigned only NPUs 4 to rank 1 on node 10.77.0.2, which asked for 1.5. Leave VLLM_RAY_PER_WORKER_GPUS "
            "above 0, and on that node `ray stop`, unset ASCEND_RT_VISIBLE_DEVICES, then "
            """`ray start ... --resources='{"NPU": N}'` with the N of `npu-smi info`.""",
            id="too few",
        ),
        pytest.param(
            ["9"],
            1,
            [0, 1, 2, 3],
            "Ray assigned NPU '9' to rank 1 on node 10.77.0.2, which has NPUs 0,1,2,3. Ray started there with a wrong "
            "ASCEND_RT_VISIBLE_DEVICES or number of NPUs. On that node `ray stop`, then "
            "`ASCEND_RT_VISIBLE_DEVICES=0,1,2,3 ray start ...`.",
            id="not there",
        ),
        pytest.param(
            ["0"],
            1,
            [],
            "Ray assigned NPU '0' to rank 1 on node 10.77.0.2, which has no NPU. Ray started there with a wrong "
            "ASCEND_RT_VISIBLE_DEVICES or number of NPUs. On that node `ray stop`, then `ray start ...`.",
            id="on a node without NPUs",
        ),
        pytest.param(
            [""],
            1,
            None,
            "Ray assigned NPU '' to rank 1 on node 10.77.0.2. Ray started there with a wrong ASCEND_RT_VISIBLE_DEVICES "
            "or number of NPUs. On that node `ray stop`, then `ray start ...`.",
            id="no number, of the list '4,'",
        ),
    ],
)
def test_the_errors_of_what_ray_assigned(
    ids: Sequence[int | str], wanted: float, usable: Sequence[int] | None, expected: str
) -> None:
    with pytest.raises(DeviceMappingError) as raised:
        check_assigned("rank 1", ids, wanted, usable, NODE)
    assert str(raised.value) == expected


@given(st.lists(st.integers(0, 15), unique=True, min_size=1), st.floats(0.0625, 8), st.lists(st.integers(0, 15)))
def test_what_is_taken_is_what_was_assigned_wanted_and_there(ids: list[int], wanted: float, usable: list[int]) -> None:
    try:
        taken = check_assigned("rank 1", [str(number) for number in ids], wanted, usable, NODE)
    except DeviceMappingError:
        assert not wanted <= len(ids) < wanted + 1 or not set(ids) <= set(usable)
    else:
        assert taken == ids and wanted <= len(ids) < wanted + 1 and set(ids) <= set(usable)
