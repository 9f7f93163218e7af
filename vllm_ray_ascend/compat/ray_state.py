"""What Ray knows of the cluster but offers by private names only, all of which vLLM uses as well."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_ray_ascend.errors import UpstreamChangedError


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Return the free resources of every live node, by node id; in Ray 2.48 to 2.60 the same name.

    Raises UpstreamChangedError where Ray no longer has it.
    """
    try:
        from ray._private.state import available_resources_per_node
    except ImportError as error:
        raise UpstreamChangedError(
            "VRA-109",
            "ray._private.state no longer has available_resources_per_node, which vLLM and vllm-ray-ascend use. "
            "Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend.",
        ) from error
    found: dict[str, Any] = available_resources_per_node()
    return found


def draining_nodes() -> dict[str, int]:
    """Return the nodes that drain, by node id, with their deadlines in ms since 1970 (0: none); in Ray 2.48 to 2.60.

    Raises UpstreamChangedError where Ray no longer has it.
    """
    from ray._private.state import state

    if not hasattr(state, "get_draining_nodes"):
        raise UpstreamChangedError(
            "VRA-261",
            "ray._private.state.state no longer has get_draining_nodes, by which vllm-ray-ascend leaves out nodes that "
            "are about to be stopped. Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend.",
        )
    found: dict[str, int] = state.get_draining_nodes()
    return found


def gcs_key_value_store() -> Any:
    """Return Ray's internal key-value store, which lives in its control store (GCS): `ray.experimental.internal_kv`.

    Raises UpstreamChangedError where Ray no longer has it.
    """
    from ray.experimental import internal_kv

    names = ("_internal_kv_put", "_internal_kv_get", "_internal_kv_del", "_internal_kv_list")
    gone = [name for name in names if not hasattr(internal_kv, name)]
    if gone:
        raise UpstreamChangedError(
            "VRA-110",
            f"ray.experimental.internal_kv no longer has {', '.join(gone)}, where vllm-ray-ascend keeps which engine "
            "runs where. Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend.",
        )
    return internal_kv


class ActorRecord(NamedTuple):
    """A living actor of any job. ``owner_id`` is the id of the worker process that made it, ``worker_id`` its own.

    ``resources`` are those that Ray assigned: by the resource's name, the amount of each of its instances.
    """

    class_name: str
    name: str
    namespace: str
    pid: int
    job_id: str
    node_id: str
    worker_id: str
    owner_id: str
    group_id: str
    resources: dict[str, dict[int, float]]


class TaskRecord(NamedTuple):
    """A task that runs, not of an actor, of any job. ``resources`` are those that it requires."""

    name: str
    pid: int
    job_id: str
    node_id: str
    group_id: str
    resources: dict[str, float]


def living_actors() -> list[ActorRecord]:
    """Return all actors that are alive, of every job and namespace, with their resources.

    Raises UpstreamChangedError where Ray no longer has its table of actors.
    """
    tables, gcs_pb2, _ = _gcs_tables("get_actor_table")
    rows = map(gcs_pb2.ActorTableData.FromString, tables.get_actor_table(None, "ALIVE"))
    return [
        ActorRecord(
            class_name=row.class_name,
            name=row.name,
            namespace=row.ray_namespace,
            pid=row.pid,
            job_id=row.job_id.hex(),
            node_id=getattr(row.address, "node_id" if hasattr(row.address, "node_id") else "raylet_id").hex(),  # 2.48
            worker_id=row.address.worker_id.hex(),
            owner_id=row.owner_address.worker_id.hex(),
            group_id=row.placement_group_id.hex(),
            resources={
                entry.name: {instance.index: instance.quantity for instance in entry.resource_ids}
                for entry in row.resource_mapping
            },
        )
        for row in rows
    ]


def running_tasks() -> list[TaskRecord]:
    """Return the tasks that run, of every job, as far as Ray keeps their events: not those of the last second.

    Raises UpstreamChangedError where Ray no longer has its table of tasks.
    """
    tables, gcs_pb2, common_pb2 = _gcs_tables("get_task_events")
    running, *ended = (common_pb2.TaskStatus.Value(name) for name in ("RUNNING", "FINISHED", "FAILED"))
    rows = map(gcs_pb2.TaskEvents.FromString, tables.get_task_events())
    return [
        TaskRecord(
            name=row.task_info.name,
            pid=row.state_updates.worker_pid,
            job_id=row.job_id.hex(),
            node_id=row.state_updates.node_id.hex(),
            group_id=row.task_info.placement_group_id.hex(),
            resources=dict(row.task_info.required_resources),
        )
        for row in rows
        if row.task_info.type == common_pb2.TaskType.NORMAL_TASK
        and running in row.state_updates.state_ts_ns
        and not any(state in row.state_updates.state_ts_ns for state in ended)
    ]


def _gcs_tables(name: str) -> tuple[Any, Any, Any]:
    """Return what reads the tables of Ray's control store by its method ``name``, and the modules of their rows."""
    try:
        from ray._private.state import state
        from ray.core.generated import common_pb2, gcs_pb2

        if hasattr(state, "_connect_and_get_accessor"):  # since Ray 2.52
            tables = state._connect_and_get_accessor()
        else:
            state._check_connected()
            tables = state.global_state_accessor
        getattr(tables, name)
    except (ImportError, AttributeError) as error:
        raise UpstreamChangedError(
            "VRA-280",
            f"Ray's control store can no longer be read by {name} ({error}), by which `vllm-ray-ascend topology` names "
            "the owners of NPUs. Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend.",
        ) from error
    return tables, gcs_pb2, common_pb2
