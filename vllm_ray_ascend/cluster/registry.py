"""Which engine runs where: each engine publishes a record in Ray's control store, where everybody can read it.

A record lives as long as its engine. One whose workers are gone (an engine that was killed) counts as absent, and the
next engine that starts removes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import msgspec

from vllm_ray_ascend.compat.ray_state import gcs_key_value_store
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.devices.owners import Claim
from vllm_ray_ascend.devices.visible import split_entries
from vllm_ray_ascend.observability.events import engine_name

_NAMESPACE = b"vllm_ray_ascend"
_PREFIX = b"engine/"


class RankRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. ``bundle_index`` is that in the engine's placement group, ``actor_name`` its Ray actor's.

    ``node_id`` is Ray's id of its node, empty in records of earlier versions.
    """

    rank: int
    local_rank: int
    address: str
    visible_index: int = msgspec.field(name="visible")
    physical_id: int = msgspec.field(name="physical")
    bundle_index: int = msgspec.field(name="bundle")
    pid: int
    actor_name: str = msgspec.field(name="actor")
    node_id: str = msgspec.field(name="node", default="")

    def is_on(self, node_id: str, address: str) -> bool:
        """Return whether the worker runs on the node with this id and address."""
        return self.node_id == node_id if self.node_id and node_id else self.address == address


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One running engine. ``share`` is the part of an NPU that each worker has, ``started`` in seconds since 1970.

    ``group`` is the placement group's id, ``device_key`` Ray's resource: "NPU" or "GPU", ``address`` and ``node_id``
    are those of the driver's node. ``tensor_parallel`` and ``pipeline_parallel`` are sizes, 0 in records of earlier
    versions.
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
    device_key: str = msgspec.field(name="device", default=NPU.key)
    node_id: str = msgspec.field(name="node", default="")
    tensor_parallel: int = msgspec.field(name="tp", default=0)
    pipeline_parallel: int = msgspec.field(name="pp", default=0)

    @property
    def owner(self) -> str:
        """The engine's name in messages."""
        return f"engine {engine_name(self.model, self.dp_rank)}"


def engine_names(records: Sequence[EngineRecord]) -> dict[tuple[str, int], str]:
    """Return a name for each engine, by its id and data parallel rank: model and rank, the id only where it is needed.

    vLLM's id of an engine is a number of 19 digits.
    """
    names = {(each.engine, each.dp_rank): engine_name(each.model, each.dp_rank) for each in records}
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} ({key[0]})" for key, name in names.items()}


def claims_of_engine(record: EngineRecord) -> list[Claim]:
    """Return the NPUs that an engine's ranks have, each rank an owner of its own."""
    return [
        Claim(
            owner=f"rank {rank.rank} of {record.owner}",
            address=rank.address,
            physical_id=rank.physical_id,
            share=record.share,
            device_key=record.device_key,
            node_id=rank.node_id,
        )
        for rank in record.ranks
    ]


def ignored_list_warning(
    visible_devices: str | None, address: str, records: Iterable[EngineRecord], kind: Kind = NPU, node_id: str = ""
) -> str | None:
    """Return a warning where the driver's ``visible_devices`` differs from what the ranks on its node have.

    Ray assigns NPUs by the list with which it was started there (vllm-ascend #4929: a visible list that is ignored).
    """
    listed = split_entries(visible_devices)
    here = (rank for record in records for rank in record.ranks if rank.is_on(node_id, address))
    assigned_ids = sorted({rank.physical_id for rank in here})
    if (
        listed is None
        or any(not entry.isdigit() for entry in listed)
        or all(str(physical_id) in listed for physical_id in assigned_ids)
    ):
        return None
    return (
        f"VRA-238: {kind.variable}={visible_devices} is set here, but Ray has assigned {kind.key} "
        f"{', '.join(map(str, assigned_ids))} of this node: it uses the list with which it was started. To use this "
        f"list: `ray stop` here, then `{kind.variable}={visible_devices} ray start ...`."
    )


def is_alive(record: EngineRecord, actor_names: Collection[str]) -> bool:
    """Return whether all of the engine's workers are among the living actors."""
    return all(rank.actor_name in actor_names for rank in record.ranks)


def publish_record(record: EngineRecord) -> None:
    """Add ``record``, and remove those of engines that are gone. Ray must be joined."""
    store = gcs_key_value_store()
    living = _living_actor_names()
    for key, other in _stored_records():
        if not is_alive(other, living):
            store._internal_kv_del(key, namespace=_NAMESPACE)
    key = _record_key(record.engine, record.dp_rank)
    store._internal_kv_put(key, msgspec.json.encode(record), namespace=_NAMESPACE)


def remove_record(record: EngineRecord) -> None:
    """Remove ``record``, if it is there."""
    gcs_key_value_store()._internal_kv_del(_record_key(record.engine, record.dp_rank), namespace=_NAMESPACE)


def running_engines() -> list[EngineRecord]:
    """Return every engine whose workers are alive, ordered by name."""
    living = _living_actor_names()
    records = [record for _, record in _stored_records() if is_alive(record, living)]
    return sorted(records, key=lambda record: (record.engine, record.dp_rank))


def _stored_records() -> Iterable[tuple[bytes, EngineRecord]]:
    store = gcs_key_value_store()
    for key in store._internal_kv_list(_PREFIX, namespace=_NAMESPACE):
        text = store._internal_kv_get(key, namespace=_NAMESPACE)
        try:
            yield key, msgspec.json.decode(text or b"", type=EngineRecord)
        except msgspec.MsgspecError:  # of another version of this package: not ours to remove
            continue


def _living_actor_names() -> set[str]:
    import ray

    return {str(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)}


def _record_key(engine: str, dp_rank: int) -> bytes:
    return _PREFIX + f"{engine}/{dp_rank}".encode()
