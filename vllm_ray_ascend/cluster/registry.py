"""Which engine runs where: each engine says so in Ray's control store, and everybody can read it there.

A record lives as long as its engine. One whose workers are gone (an engine that was killed) counts as absent, and the
next engine that starts removes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from vllm_ray_ascend.compat.ray_state import kept_values
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.devices.owners import Claim
from vllm_ray_ascend.devices.visible import entries

_NAMESPACE = b"vllm_ray_ascend"
_PREFIX = b"engine/"


class RankRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. ``bundle`` is its index in the engine's placement group, ``actor`` its Ray actor's name."""

    rank: int
    local_rank: int
    address: str
    visible: int
    physical: int
    bundle: int
    pid: int
    actor: str


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One running engine. ``share`` is the part of an NPU that each worker has, ``started`` in seconds since 1970.

    ``device`` says whether these are NPUs or GPUs.
    """

    engine: str
    dp_rank: int
    model: str
    address: str
    pid: int
    group: str
    share: float
    started: float
    ranks: tuple[RankRecord, ...]
    device: str = NPU.key

    @property
    def owner(self) -> str:
        """How messages call it."""
        return f"engine {self.engine} (data parallel rank {self.dp_rank}, {self.model})"


def claims(record: EngineRecord) -> list[Claim]:
    """The NPUs that an engine's ranks have, each rank an owner of its own."""
    return [
        Claim(
            owner=f"rank {rank.rank} of {record.owner}",
            address=rank.address,
            physical=rank.physical,
            share=record.share,
            device=record.device,
        )
        for rank in record.ranks
    ]


def unheeded_list(visible: str | None, address: str, records: Iterable[EngineRecord], kind: Kind = NPU) -> str | None:
    """Why ``visible``, the driver's list, is not what the engine's ranks on its node ``address`` have; None if it is.

    Ray assigns NPUs by the list with which it was started there (vllm-ascend #4929: a visible list that is ignored).
    """
    listed = entries(visible)
    got = sorted({rank.physical for record in records for rank in record.ranks if rank.address == address})
    if (
        listed is None
        or any(not entry.isdigit() for entry in listed)
        or all(str(physical) in listed for physical in got)
    ):
        return None
    return (
        f"{kind.variable}={visible} is set here, but Ray has assigned {kind.key} {', '.join(map(str, got))} of this "
        "node: it counts by the list with which it was started. To have this one: `ray stop` here, then "
        f"`{kind.variable}={visible} ray start ...`."
    )


def is_alive(record: EngineRecord, actors: Collection[str]) -> bool:
    """Whether all of the engine's workers are among the living ``actors``."""
    return all(rank.actor in actors for rank in record.ranks)


def publish(record: EngineRecord) -> None:
    """Add ``record``, and remove those of engines that are gone. Ray must be joined."""
    store = kept_values()
    living = _living_actors()
    for key, other in _stored():
        if not is_alive(other, living):
            store._internal_kv_del(key, namespace=_NAMESPACE)
    store._internal_kv_put(_key(record.engine, record.dp_rank), msgspec.json.encode(record), namespace=_NAMESPACE)


def withdraw(record: EngineRecord) -> None:
    """Remove ``record``; nothing happens where it is not there."""
    kept_values()._internal_kv_del(_key(record.engine, record.dp_rank), namespace=_NAMESPACE)


def running() -> list[EngineRecord]:
    """Every engine whose workers live, by name."""
    living = _living_actors()
    found = [record for _, record in _stored() if is_alive(record, living)]
    return sorted(found, key=lambda record: (record.engine, record.dp_rank))


def _stored() -> Iterable[tuple[bytes, EngineRecord]]:
    store = kept_values()
    for key in store._internal_kv_list(_PREFIX, namespace=_NAMESPACE):
        text = store._internal_kv_get(key, namespace=_NAMESPACE)
        try:
            yield key, msgspec.json.decode(text or b"", type=EngineRecord)
        except msgspec.MsgspecError:  # of another version of this package: not ours to remove
            continue


def _living_actors() -> set[str]:
    import ray

    return {str(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)}


def _key(engine: str, dp_rank: int) -> bytes:
    return _PREFIX + f"{engine}/{dp_rank}".encode()
