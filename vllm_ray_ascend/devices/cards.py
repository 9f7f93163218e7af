"""Cards and dies. An A3 card has two dies, and CANN counts each die as an NPU of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.owners import Claim

_COLUMN = re.compile(r"(?:NPU|Chip)(?: (?!NPU |Chip )\S+)+")  # one blank may stand inside a title, and between two


@dataclass(frozen=True)
class Die:
    """One NPU as CANN counts it (``physical``), and the ``chip`` of the ``card`` that it is; ``name`` is the chip's."""

    card: int
    chip: int
    physical: int
    name: str


def parse_npu_smi(text: str) -> list[Die]:
    """The dies in the output of `npu-smi info -m`, in its order; none where the output has no table.

    Chips without a number of CANN's (Chip Logic ID "-", such as a card's Mcu) are no dies. Old drivers leave out the
    columns of chips: then a card is one die, with the card's number.
    """
    lines = iter(text.splitlines())
    titles = next((_COLUMN.findall(line) for line in lines if "NPU ID" in line), [])
    return [die for line in lines if (die := _die(titles, line.split())) is not None]


def die_name(dies: Sequence[Die], physical: int) -> str:
    """How messages call an NPU: "NPU 5 (card 2, die 1)" on a card with more than one die, "NPU 5" on others."""
    for die in dies:
        if die.physical == physical and sum(other.card == die.card for other in dies) > 1:
            return f"NPU {physical} (card {die.card}, die {die.chip})"
    return f"NPU {physical}"


def cards_shared(dies: Sequence[Die], claims: Iterable[Claim]) -> dict[int, list[str]]:
    """Cards whose dies have different owners, each with these, by name. ``claims`` are those on the node of ``dies``.

    Such owners disturb each other's bandwidth, no more.
    """
    card_of = {die.physical: die.card for die in dies}
    owners: dict[int, set[str]] = {}
    for claim in claims:
        if claim.physical in card_of:
            owners.setdefault(card_of[claim.physical], set()).add(claim.owner)
    return {card: sorted(names) for card, names in sorted(owners.items()) if len(names) > 1}


def _die(titles: Sequence[str], cells: Sequence[str]) -> Die | None:
    """The die of one row. Only the last cell, the chip's name, may have blanks."""
    if "NPU ID" not in titles or len(cells) < len(titles):
        return None
    row = dict(zip(titles, cells, strict=False))
    card = row["NPU ID"]
    chip, physical = row.get("Chip ID", "0"), row.get("Chip Logic ID", card)
    if not (card.isdigit() and chip.isdigit() and physical.isdigit()):
        return None
    name = " ".join(cells[titles.index("Chip Name") :]) if "Chip Name" in titles else ""
    return Die(card=int(card), chip=int(chip), physical=int(physical), name=name)
