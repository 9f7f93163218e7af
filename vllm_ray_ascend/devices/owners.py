"""Who owns which NPU, by what Ray assigned: no NPU has two owners unless they share it on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.visible import VARIABLE, listed
from vllm_ray_ascend.errors import DeviceMappingError

_DIGITS = 4  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Claim:
    """One owner's part of one NPU of the node at ``address``; ``share`` is VLLM_RAY_PER_WORKER_GPUS, 1 for all."""

    owner: str
    address: str
    physical: int
    share: float = 1.0


def check_claims(claims: Iterable[Claim]) -> None:
    """Raise DeviceMappingError where the owners of an NPU want more than all of it.

    What one owner claims twice counts once.
    """
    crowded = [
        (npu, shares) for npu, shares in sorted(_by_npu(claims).items()) if round(sum(shares.values()), _DIGITS) > 1
    ]
    if not crowded:
        return
    told = "; ".join(f"NPU {physical} of node {address}: {_and(shares)}" for (address, physical), shares in crowded)
    most = max(len(shares) for _, shares in crowded)
    part = math.floor(10**_DIGITS / most) / 10**_DIGITS
    raise DeviceMappingError(
        f"NPUs with more than one owner: {told}. Stop all but one (`vllm-ray-ascend topology` shows them). See that "
        f"each of these nodes runs one Ray only, started with no more NPUs than its {VARIABLE} has. To share an NPU on "
        f"purpose, start every owner with VLLM_RAY_PER_WORKER_GPUS={part:g}."
    )


def check_assigned(
    owner: str, ids: Sequence[int | str], wanted: float, usable: Sequence[int] | None, address: str
) -> list[int]:
    """Physical numbers of the NPUs that Ray assigned to ``owner``, a worker that asked for ``wanted`` NPUs.

    ``usable`` are those that exist on its node, None where nobody knows. Raises DeviceMappingError where Ray's answer
    cannot be right. One such answer is the worker's whole visible list, which Ray gives when a number that it assigned
    lies beyond that list (get_accelerator_ids_for_accelerator_resource in ray/_private/worker.py).
    """
    text = ",".join(sorted(map(str, ids), key=lambda each: (len(each), each)))  # Ray's order is that of a set
    where = f"{owner} on node {address}"
    needed = max(1, math.ceil(wanted))
    if len(ids) < needed:
        raise DeviceMappingError(
            f"Ray assigned {f'only NPUs {text}' if ids else 'no NPU'} to {where}, which asked for {wanted:g}. Leave "
            f"VLLM_RAY_PER_WORKER_GPUS above 0, and on that node `ray stop`, unset {VARIABLE}, then "
            """`ray start ... --resources='{"NPU": N}'` with the N of `npu-smi info`."""
        )
    if len(ids) > needed:
        raise DeviceMappingError(
            f"Ray assigned NPUs {text} to {where}, which asked for {wanted:g}: the node declares more NPUs to Ray than "
            f"its {VARIABLE} has, and Ray then hands out the whole list. On that node `ray stop`, then "
            f"""`{VARIABLE}={text} ray start ... --resources='{{"NPU": {len(ids)}}}'`."""
        )
    return [_checked(each, usable, where) for each in ids]


def _checked(assigned: int | str, usable: Sequence[int] | None, where: str) -> int:
    number = str(assigned).strip()
    if number.isascii() and number.isdigit() and (usable is None or int(number) in usable):
        return int(number)
    has = "" if usable is None else f", which has NPUs {listed(usable)}" if usable else ", which has no NPU"
    mended = f"{VARIABLE}={listed(usable)} " if usable else ""
    raise DeviceMappingError(
        f"Ray assigned NPU {number!r} to {where}{has}. Ray started there with a wrong {VARIABLE} or number of NPUs. "
        f"On that node `ray stop`, then `{mended}ray start ...`."
    )


def _by_npu(claims: Iterable[Claim]) -> dict[tuple[str, int], dict[str, float]]:
    """The share of every owner, by node and NPU."""
    npus: dict[tuple[str, int], dict[str, float]] = {}
    for claim in claims:
        shares = npus.setdefault((claim.address, claim.physical), {})
        shares[claim.owner] = max(claim.share, shares.get(claim.owner, 0.0))
    return npus


def _and(shares: Mapping[str, float]) -> str:
    return " and ".join(owner if share == 1 else f"{owner} ({share:g} of it)" for owner, share in shares.items())
