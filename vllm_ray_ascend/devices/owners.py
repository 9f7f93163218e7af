"""Which worker owns which NPU, by what Ray assigned: no NPU has two owners unless they share it on purpose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_ray_ascend.devices.kind import KINDS, NPU, Kind
from vllm_ray_ascend.devices.visible import format_ids
from vllm_ray_ascend.errors import DeviceMappingError

_DIGITS = 4  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Claim:
    """One owner's part of one device of a node.

    ``node_id`` is Ray's id of the node: containers on one host have one address and numberings of their own. It is
    empty in records of earlier versions, which count by ``address``. ``share`` is VLLM_RAY_PER_WORKER_GPUS, 1 for the
    whole device; ``device_key`` is Ray's resource, "NPU" or "GPU".
    """

    owner: str
    address: str
    physical_id: int
    share: float = 1.0
    device_key: str = NPU.key
    node_id: str = ""


class _Device(NamedTuple):
    node: str
    """Ray's id of the node, or its address where the id is not known."""
    device_key: str
    physical_id: int


def check_claims(claims: Iterable[Claim]) -> None:
    """Raise DeviceMappingError where the owners of a device together claim more than all of it.

    Repeated claims of one owner count once.
    """
    claims = list(claims)
    addresses = {claim.node_id: claim.address for claim in claims}
    conflicts = [
        (device, shares)
        for device, shares in sorted(_shares_by_device(claims).items())
        if round(sum(shares.values()), _DIGITS) > 1
    ]
    if not conflicts:
        return
    listed = "; ".join(
        f"{device.device_key} {device.physical_id} of node {addresses.get(device.node, device.node)}: "
        f"{_format_owners(shares)}"
        for device, shares in conflicts
    )
    kind = KINDS[conflicts[0][0].device_key]
    most_owners = max(len(shares) for _, shares in conflicts)
    fitting_share = math.floor(10**_DIGITS / most_owners) / 10**_DIGITS
    raise DeviceMappingError(
        "VRA-248",
        f"{kind.key}s with more than one owner: {listed}. Stop all but one (`vllm-ray-ascend topology` shows them). "
        f"Check that each of these nodes runs one Ray only, started with no more {kind.key}s than its {kind.variable} "
        f"has. To share {kind.with_article} on purpose, start every owner with "
        f"VLLM_RAY_PER_WORKER_GPUS={fitting_share:g}.",
    )


def check_assigned_ids(
    owner: str,
    assigned_ids: Sequence[int | str],
    requested: float,
    usable_ids: Sequence[int] | None,
    address: str,
    kind: Kind = NPU,
) -> list[int]:
    """Return the physical ids that Ray assigned to ``owner``, a worker that requested ``requested`` devices.

    ``usable_ids`` are the physical ids that exist on its node, None where they are not known. Raises DeviceMappingError
    where Ray's answer cannot be right. One such answer is the worker's whole visible list, which Ray gives when a
    number that it assigned lies beyond that list (get_accelerator_ids_for_accelerator_resource in
    ray/_private/worker.py).
    """
    text = ",".join(sorted(map(str, assigned_ids), key=lambda each: (len(each), each)))  # Ray's order is that of a set
    worker = f"{owner} on node {address}"
    needed = max(1, math.ceil(requested))
    if len(assigned_ids) < needed:
        raise DeviceMappingError(
            "VRA-249",
            f"Ray assigned {f'only {kind.key}s {text}' if assigned_ids else f'no {kind.key}'} to {worker}, which "
            f"requested {requested:g}. Leave VLLM_RAY_PER_WORKER_GPUS above 0, and on that node `ray stop`, unset "
            f"{kind.variable}, then `ray start ... {kind.ray_start_option('N')}` with the N of `{kind.list_command}`.",
        )
    if len(assigned_ids) > needed:
        raise DeviceMappingError(
            "VRA-250",
            f"Ray assigned {kind.key}s {text} to {worker}, which requested {requested:g}: the node declares more "
            f"{kind.key}s to Ray than its {kind.variable} has, and Ray then hands out the whole list. On that node "
            f"`ray stop`, then `{kind.variable}={text} ray start ... {kind.ray_start_option(len(assigned_ids))}`.",
        )
    return [_parse_assigned_id(each, usable_ids, worker, kind) for each in assigned_ids]


def _parse_assigned_id(assigned_id: int | str, usable_ids: Sequence[int] | None, worker: str, kind: Kind) -> int:
    text = str(assigned_id).strip()
    if text.isascii() and text.isdigit() and (usable_ids is None or int(text) in usable_ids):
        return int(text)
    has = ""
    if usable_ids is not None:
        has = f", which has {kind.key}s {format_ids(usable_ids)}" if usable_ids else f", which has no {kind.key}"
    variable = f"{kind.variable}={format_ids(usable_ids)} " if usable_ids else ""
    raise DeviceMappingError(
        "VRA-251",
        f"Ray assigned {kind.key} {text!r} to {worker}{has}. Ray was started there with a wrong {kind.variable} or a "
        f"wrong number of {kind.key}s. On that node `ray stop`, then `{variable}ray start ...`.",
    )


def _shares_by_device(claims: Iterable[Claim]) -> dict[_Device, dict[str, float]]:
    """Return the share of every owner, by device."""
    devices: dict[_Device, dict[str, float]] = {}
    for claim in claims:
        device = _Device(claim.node_id or claim.address, claim.device_key, claim.physical_id)
        shares = devices.setdefault(device, {})
        shares[claim.owner] = max(claim.share, shares.get(claim.owner, 0.0))
    return devices


def _format_owners(shares: Mapping[str, float]) -> str:
    return " and ".join(owner if share == 1 else f"{owner} ({share:g} of it)" for owner, share in shares.items())


def reject_device_ids(ids: Sequence[int] | None, kind: Kind = NPU) -> None:
    """Raise DeviceMappingError where ``ids``, from --device-ids, are given: over Ray they are not available.

    vLLM only warns of it.
    """
    if ids is not None:
        given = ",".join(map(str, ids))
        raise DeviceMappingError(
            "VRA-302",
            f"--device-ids ({kind.key}s {given}) cannot choose {kind.key}s over Ray, which assigns them itself. "
            f"Leave --device-ids out, or give Ray the list on that node: `ray stop`, then "
            f"`{kind.variable}={given} ray start ...`.",
        )
