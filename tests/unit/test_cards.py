"""Cards with one and two dies, by `npu-smi info -m`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.devices.cards import Die, die_name, find_shared_cards, parse_npu_smi
from vllm_ray_ascend.devices.owners import Claim

pytestmark = pytest.mark.unit

A2 = """\
\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name
\t0                              0                              0                              Ascend 910B3
\t0                              1                              -                              Mcu
\t1                              0                              1                              Ascend 910B3
\t1                              1                              -                              Mcu
"""
A3 = """\
NPU ID  Chip ID  Chip Logic ID  Chip Phy-ID Chip Name
0 0 0 0 Ascend910
0 1 1 1 Ascend910
0 2 - - Mcu
2 0 4 12 Ascend910
2 1 5 13 Ascend910
"""


def test_a_card_with_one_die() -> None:
    assert parse_npu_smi(A2) == [Die(0, 0, 0, "Ascend 910B3"), Die(1, 0, 1, "Ascend 910B3")]


def test_a_card_with_two_dies_is_two_npus_as_in_cann() -> None:
    assert parse_npu_smi(A3) == [
        Die(0, 0, 0, "Ascend910"),
        Die(0, 1, 1, "Ascend910"),
        Die(2, 0, 4, "Ascend910"),
        Die(2, 1, 5, "Ascend910"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("dcmi model initialized failed, because the device is used. ret is -8020\n", []),
        (A2.splitlines()[0], []),
        ("NPU ID  Chip Name\n3  Ascend 910A\n", [Die(3, 0, 3, "Ascend 910A")]),
        ("NPU ID  Chip ID  Chip Logic ID\n8 1 3\n8 2\n\n", [Die(8, 1, 3, "")]),
    ],
)
def test_other_output(text: str, expected: list[Die]) -> None:
    assert parse_npu_smi(text) == expected


def test_the_name_of_a_die() -> None:
    assert die_name(parse_npu_smi(A3), 5) == "NPU 5 (card 2, die 1)"
    assert die_name(parse_npu_smi(A3), 9) == "NPU 9"
    assert die_name(parse_npu_smi(A2), 1) == "NPU 1"
    assert die_name([], 1) == "NPU 1"


def test_cards_with_two_owners() -> None:
    claims = [Claim("B", "n", 1), Claim("A", "n", 0), Claim("A", "n", 4), Claim("A", "n", 5), Claim("C", "n", 9)]
    assert find_shared_cards(parse_npu_smi(A3), claims) == {0: ["A", "B"]}
    assert find_shared_cards(parse_npu_smi(A2), claims) == {}


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 1)), unique=True), st.sampled_from(["Ascend 910C", "X"]))
def test_output_of_npu_smi_is_parsed(places: list[tuple[int, int]], name: str) -> None:
    dies = [Die(card, chip, 2 * card + chip, name) for card, chip in places]
    rows = [f"\t{die.card}      {die.chip}      {die.physical_id}      {die.name}     " for die in dies]
    assert parse_npu_smi("\n".join([A2.splitlines()[0], *rows])) == dies
    both = {card for card, _ in places if {(card, 0), (card, 1)} <= set(places)}
    for die in dies:
        assert ("card" in die_name(dies, die.physical_id)) == (die.card in both)
    owners = [Claim(f"owner of {die.physical_id}", "n", die.physical_id) for die in dies]
    assert set(find_shared_cards(dies, owners)) == both
