"""Who owns which NPU, by what Ray assigned: no NPU has two owners unless they share it on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.kind import KINDS, NPU, Kind
from vllm_ray_ascend.devices.visible import listed
from vllm_ray_ascend.errors import DeviceMappingError

_DIGITS = 4  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Claim:
    """One owner's part of one NPU of the node at ``address``; ``share`` is VLLM_RAY_PER_WORKER_GPUS, 1 for all."""

    owner: str
    address: str
    physical: int
    share: float = 1.0
    device: str = NPU.key


def check_claims(claims: Iterable[Claim]) -> None:
    """Raise DeviceMappingError where the owners of an NPU want more than all of it.

    What one owner claims twice counts once.
    """
    crowded = [
        (npu, shares) for npu, shares in sorted(_by_npu(claims).items()) if round(sum(shares.values()), _DIGITS) > 1
    ]
    if not crowded:
        return
    told = "; ".join(f"{device} {number} of node {node}: {_and(shares)}" for (node, device, number), shares in crowded)
    kind = KINDS[crowded[0][0][1]]
    most = max(len(shares) for _, shares in crowded)
    part = math.floor(10**_DIGITS / most) / 10**_DIGITS
    raise DeviceMappingError(
        f"{kind.key}s with more than one owner: {told}. Stop all but one (`vllm-ray-ascend topology` shows them). "
        f"See that each of these nodes runs one Ray only, started with no more {kind.key}s than its {kind.variable} "
        f"has. To share {kind.one} on purpose, start every owner with VLLM_RAY_PER_WORKER_GPUS={part:g}."
    )


def check_assigned(
    owner: str,
    ids: Sequence[int | str],
    wanted: float,
    usable: Sequence[int] | None,
    address: str,
    kind: Kind = NPU,
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
            f"Ray assigned {f'only {kind.key}s {text}' if ids else f'no {kind.key}'} to {where}, which asked for "
            f"{wanted:g}. Leave VLLM_RAY_PER_WORKER_GPUS above 0, and on that node `ray stop`, unset {kind.variable}, "
            f"then `ray start ... {kind.ray_start('N')}` with the N of `{kind.list_command}`."
        )
    if len(ids) > needed:
        raise DeviceMappingError(
            f"Ray assigned {kind.key}s {text} to {where}, which asked for {wanted:g}: the node declares more "
            f"{kind.key}s to Ray than its {kind.variable} has, and Ray then hands out the whole list. On that node "
            f"`ray stop`, then `{kind.variable}={text} ray start ... {kind.ray_start(len(ids))}`."
        )
    return [_checked(each, usable, where, kind) for each in ids]


def _checked(assigned: int | str, usable: Sequence[int] | None, where: str, kind: Kind) -> int:
    number = str(assigned).strip()
    if number.isascii() and number.isdigit() and (usable is None or int(number) in usable):
        return int(number)
    has = ""
    if usable is not None:
        has = f", which has {kind.key}s {listed(usable)}" if usable else f", which has no {kind.key}"
    mended = f"{kind.variable}={listed(usable)} " if usable else ""
    raise DeviceMappingError(
        f"Ray assigned {kind.key} {number!r} to {where}{has}. Ray started there with a wrong {kind.variable} or "
        f"number of {kind.key}s. On that node `ray stop`, then `{mended}ray start ...`."
    )


def _by_npu(claims: Iterable[Claim]) -> dict[tuple[str, str, int], dict[str, float]]:
    """The share of every owner, by node and NPU."""
    npus: dict[tuple[str, str, int], dict[str, float]] = {}
    for claim in claims:
        shares = npus.setdefault((claim.address, claim.device, claim.physical), {})
        shares[claim.owner] = max(claim.share, shares.get(claim.owner, 0.0))
    return npus


def _and(shares: Mapping[str, float]) -> str:
    return " and ".join(owner if share == 1 else f"{owner} ({share:g} of it)" for owner, share in shares.items())
