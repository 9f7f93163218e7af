"""Who has the NPUs that no engine of this plugin has: actors and tasks of any job, as Ray's tables name them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_ray_ascend.compat.ray_state import ActorRecord, TaskRecord

_REPLICA = re.compile(r"SERVE_REPLICA::(?P<application>[^#]+)#(?P<deployment>[^#]+)#")
"""The name of a replica of Ray Serve: of its actor, and of its placement group."""
_LEAST = 1e-3
"""Ray counts in ten-thousandths."""


class DeviceUser(msgspec.Struct, frozen=True, kw_only=True):
    """An actor or a task that has NPUs of a node and is no worker of a registered engine.

    ``amount`` is how much it has in all, ``physical_ids`` of which NPUs: not known of a task, of which Ray says the
    number only. ``deployment`` is that of Ray Serve to which it belongs, in words.
    """

    kind: str
    class_name: str = msgspec.field(name="class")
    name: str = ""
    namespace: str = ""
    pid: int
    job_id: str = msgspec.field(name="job")
    group: str
    amount: float
    physical_ids: tuple[int, ...] = msgspec.field(name="physical", default=())
    deployment: str = ""

    def __str__(self) -> str:
        name = "" if not self.name or _REPLICA.match(self.name) else f" {self.name}"
        namespace = f", namespace {self.namespace}" if name and self.namespace else ""
        deployment = f" of {self.deployment}" if self.deployment else ""
        return f"{self.kind} {self.class_name}{name}{deployment} (pid {self.pid}, job {self.job_id}{namespace})"


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """NPUs of a node that a placement group holds and nobody uses."""

    group: str
    name: str
    amount: float

    def __str__(self) -> str:
        return f"placement group {self.group} ({serve_deployment(self.name) or self.name or 'no name'})"


def serve_deployment(name: str) -> str:
    """Return the deployment of Ray Serve, in words, whose actor or placement group has this name; else ""."""
    found = _REPLICA.match(name)
    return f"Serve application {found['application']}, deployment {found['deployment']}" if found else ""


def users_of_node(
    node_id: str,
    device_key: str,
    usable_ids: Sequence[int] | None,
    actors: Sequence[ActorRecord],
    tasks: Iterable[TaskRecord],
    group_table: Mapping[str, Mapping[str, Any]],
) -> list[DeviceUser]:
    """Return who has NPUs of a node, actors first, by name; ``device_key`` is Ray's resource, "NPU" or "GPU".

    ``usable_ids`` are the physical ids of the list with which Ray was started there, in its order, which is how Ray
    counts; None: not known. ``group_table`` is `ray.util.placement_group_table()`.
    """
    creators = {actor.worker_id: actor for actor in actors}
    users = [
        DeviceUser(
            kind="actor",
            class_name=actor.class_name,
            name=actor.name,
            namespace=actor.namespace,
            pid=actor.pid,
            job_id=actor.job_id,
            group=actor.group_id,
            amount=sum(amounts.values()),
            physical_ids=tuple(
                usable_ids[index] for index in sorted(amounts) if usable_ids and index < len(usable_ids)
            ),
            deployment=_deployment_of(actor, creators, group_table),
        )
        for actor in actors
        if actor.node_id == node_id and (amounts := _assigned_instances(actor.resources, device_key))
    ]
    users += [
        DeviceUser(
            kind="task",
            class_name=task.name,
            pid=task.pid,
            job_id=task.job_id,
            group=task.group_id,
            amount=amount,
            deployment=_deployment_of_group(task.group_id, group_table),
        )
        for task in tasks
        if task.node_id == node_id and (amount := _required_amount(task.resources, device_key))
    ]
    return sorted(users, key=lambda user: (user.kind, user.name, user.pid))


def idle_reservations(
    node_id: str, device_key: str, group_table: Mapping[str, Mapping[str, Any]], used: Mapping[str, float]
) -> Iterator[Reservation]:
    """Yield what placement groups hold of a node beyond ``used``, the amounts in use there, by the group's id."""
    for group_id, entry in group_table.items():
        places = entry.get("bundles_to_node_id", {})
        held = sum(float(b.get(device_key, 0)) for i, b in entry["bundles"].items() if places.get(i) == node_id)
        idle = held - used.get(group_id, 0.0)
        if entry["state"] == "CREATED" and idle > _LEAST:
            yield Reservation(group=group_id, name=str(entry.get("name", "")), amount=round(idle, 4))


def _assigned_instances(resources: Mapping[str, Mapping[int, float]], device_key: str) -> dict[int, float]:
    """Return the amount of each instance. In a placement group each bundle has a resource, and all together another."""
    own = re.compile(rf"{device_key}(_group_\d+_[0-9a-f]+)?")
    amounts: dict[int, float] = {}
    for name, instances in resources.items():
        for index, amount in instances.items() if own.fullmatch(name) else ():
            amounts[index] = amounts.get(index, 0.0) + amount
    return amounts


def _required_amount(resources: Mapping[str, float], device_key: str) -> float:
    own = re.compile(rf"{device_key}(_group_[0-9a-f]+)?")
    return sum(amount for name, amount in resources.items() if own.fullmatch(name))


def _deployment_of(
    actor: ActorRecord, creators: Mapping[str, ActorRecord], group_table: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the deployment to which an actor belongs: by its name, that of an actor that made it, or its group's."""
    seen: set[str] = set()
    each: ActorRecord | None = actor
    while each is not None and each.worker_id not in seen:
        if found := serve_deployment(each.name):
            return found
        seen.add(each.worker_id)
        each = creators.get(each.owner_id)
    return _deployment_of_group(actor.group_id, group_table)


def _deployment_of_group(group_id: str, group_table: Mapping[str, Mapping[str, Any]]) -> str:
    return serve_deployment(str(group_table.get(group_id, {}).get("name", "")))
