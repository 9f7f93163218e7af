"""Cards and dies. An A3 card has two dies, and CANN counts each die as an NPU of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.owners import Claim

_COLUMN = re.compile(r"(?:NPU|Chip)(?: (?!NPU |Chip )\S+)+")  # one blank may stand inside a title, and between two


@dataclass(frozen=True)
class Die:
    """One NPU: the ``chip`` of a ``card`` as npu-smi numbers them, CANN's ``physical_id``, the chip's ``name``."""

    card: int
    chip: int
    physical_id: int
    name: str


def parse_npu_smi(text: str) -> list[Die]:
    """Return the dies in the output of `npu-smi info -m`, in its order; none where the output has no table.

    Chips to which CANN gives no number (Chip Logic ID "-", such as a card's Mcu) are not dies. Old drivers leave out
    the columns of chips: then a card is one die, with the card's number.
    """
    lines = iter(text.splitlines())
    titles = next((_COLUMN.findall(line) for line in lines if "NPU ID" in line), [])
    return [die for line in lines if (die := _parse_row(titles, line.split())) is not None]


def die_name(dies: Sequence[Die], physical_id: int) -> str:
    """Return the name of an NPU in messages: "NPU 5 (card 2, die 1)" on a card with several dies, else "NPU 5"."""
    for die in dies:
        if die.physical_id == physical_id and sum(other.card == die.card for other in dies) > 1:
            return f"NPU {physical_id} (card {die.card}, die {die.chip})"
    return f"NPU {physical_id}"


def find_shared_cards(dies: Sequence[Die], claims: Iterable[Claim]) -> dict[int, list[str]]:
    """Return the cards whose dies have different owners, each with its owners' names, sorted.

    ``claims`` are those on the node of ``dies``. Such owners share the card's bandwidth, nothing else.
    """
    card_of = {die.physical_id: die.card for die in dies}
    owners: dict[int, set[str]] = {}
    for claim in claims:
        if claim.physical_id in card_of:
            owners.setdefault(card_of[claim.physical_id], set()).add(claim.owner)
    return {card: sorted(names) for card, names in sorted(owners.items()) if len(names) > 1}


def _parse_row(titles: Sequence[str], cells: Sequence[str]) -> Die | None:
    """Return the die of one row, or None. Only the last cell, the chip's name, may have blanks."""
    if "NPU ID" not in titles or len(cells) < len(titles):
        return None
    row = dict(zip(titles, cells, strict=False))
    card = row["NPU ID"]
    chip, physical_id = row.get("Chip ID", "0"), row.get("Chip Logic ID", card)
    if not (card.isdigit() and chip.isdigit() and physical_id.isdigit()):
        return None
    name = " ".join(cells[titles.index("Chip Name") :]) if "Chip Name" in titles else ""
    return Die(card=int(card), chip=int(chip), physical_id=int(physical_id), name=name)
