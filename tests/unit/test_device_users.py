"""Who has NPUs beside engines, from the rows of Ray's tables."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.test_topology import HEAD, engine, node, rank
from vllm_ray_ascend.cluster.device_users import idle_reservations, serve_deployment, users_of_node
from vllm_ray_ascend.cluster.topology import build_topology, format_lines
from vllm_ray_ascend.compat.ray_state import ActorRecord, TaskRecord

pytestmark = pytest.mark.unit

REPLICA = "SERVE_REPLICA::chat#Model#x7"
DEPLOYMENT = "Serve application chat, deployment Model"


def actor(class_name: str = "Trainer", pid: int = 5, **values: Any) -> ActorRecord:
    defaults: dict[str, Any] = {
        "name": "",
        "namespace": "train",
        "job_id": "02",
        "node_id": "n1",
        "worker_id": f"w{pid}",
        "owner_id": "driver",
        "group_id": "",
        "resources": {"NPU": {1: 1.0}},
    }
    return ActorRecord(class_name=class_name, pid=pid, **{**defaults, **values})


def task(**values: Any) -> TaskRecord:
    defaults: dict[str, Any] = {
        "name": "f",
        "pid": 9,
        "job_id": "03",
        "node_id": "n1",
        "group_id": "",
        "resources": {"NPU": 1.0},
    }
    return TaskRecord(**{**defaults, **values})


def group(name: str, npus: float, state: str = "CREATED") -> dict[str, Any]:
    return {"name": name, "state": state, "bundles": {0: {"NPU": npus}}, "bundles_to_node_id": {0: "n1"}}


def test_instances_count_the_list_with_which_ray_was_started() -> None:
    """In a placement group Ray gives each resource by its bundle and by the whole group; one of them counts."""
    of_group = {"NPU_group_0_ab": {0: 1.0}, "NPU_group_ab": {0: 1.0}, "bundle_group_0_ab": {0: 0.001}}
    actors = [
        actor(resources={"NPU": {2: 0.5}}),
        actor(pid=6, resources=of_group, group_id="ab"),
        actor(pid=7, node_id="n2"),
        actor(pid=8, resources={"CPU": {0: 1.0}}),
    ]
    found = users_of_node("n1", "NPU", (4, 5, 6, 7), actors, (), {})
    assert [(user.pid, user.physical_ids, user.amount) for user in found] == [(5, (6,), 0.5), (6, (4,), 1.0)]
    assert [user.physical_ids for user in users_of_node("n1", "NPU", None, actors, (), {})] == [(), ()]
    assert users_of_node("n1", "GPU", (4,), actors, (), {}) == []


def test_tasks_have_a_number_of_npus() -> None:
    in_bundle = task(resources={"NPU_group_ab": 2.0, "NPU_group_0_ab": 2.0, "bundle_group_ab": 0.001}, group_id="ab")
    tasks = [task(), in_bundle, task(node_id="n2"), task(resources={"CPU": 1.0})]
    found = users_of_node("n1", "NPU", (0,), [], tasks, {"ab": group(REPLICA, 2)})
    assert [(user.kind, user.amount, user.physical_ids) for user in found] == [("task", 1.0, ()), ("task", 2.0, ())]
    assert str(found[0]) == "task f (pid 9, job 03)"
    assert str(found[1]) == f"task f of {DEPLOYMENT} (pid 9, job 03)"


@pytest.mark.parametrize(
    ("user", "groups", "text"),
    [
        (actor(), {}, "actor Trainer (pid 5, job 02)"),
        (actor(name="t0"), {}, "actor Trainer t0 (pid 5, job 02, namespace train)"),
        (actor(name=REPLICA), {}, f"actor Trainer of {DEPLOYMENT} (pid 5, job 02)"),
        (actor(owner_id="w60"), {}, f"actor Trainer of {DEPLOYMENT} (pid 5, job 02)"),
        (actor(group_id="ab"), {"ab": group(REPLICA, 1)}, f"actor Trainer of {DEPLOYMENT} (pid 5, job 02)"),
        (actor(owner_id="w5"), {"ab": group(REPLICA, 1)}, "actor Trainer (pid 5, job 02)"),
    ],
    ids=["plain", "named", "replica", "made by an actor of a replica", "in a replica's group", "made by itself"],
)
def test_texts(user: ActorRecord, groups: dict[str, Any], text: str) -> None:
    above = actor("Between", 60, owner_id="w61", resources={}), actor("Replica", 61, name=REPLICA, resources={})
    assert [str(found) for found in users_of_node("n1", "NPU", (0, 1), [user, *above], (), groups)] == [text]


def test_names_of_ray_serve() -> None:
    assert serve_deployment(REPLICA) == DEPLOYMENT
    assert serve_deployment("SERVE_CONTROLLER_ACTOR") == serve_deployment("") == ""


def test_what_groups_hold_for_nobody() -> None:
    table = {"ab": group("later", 2), "cd": group("used", 1), "ef": group("gone", 1, "REMOVED")}
    found = list(idle_reservations("n1", "NPU", table, {"ab": 0.5, "cd": 1.0}))
    assert [(each.group, each.amount, str(each)) for each in found] == [("ab", 1.5, "placement group ab (later)")]
    assert list(idle_reservations("n2", "NPU", table, {})) == []


def test_an_engine_in_ray_serve_and_others() -> None:
    """The engine's workers are actors too, and are named once; what remains is held by others."""
    given = node(HEAD, 6, 0, (0, 1, 2, 3, 4, 5))
    given = msgspec.structs.replace(given, node_id="n1")
    worker = actor("RayAscendWorkerProc", 100, name="w0", resources={"NPU_group_0_aa": {0: 1.0}}, group_id="aa")
    table = {"aa": group(REPLICA, 1), "bb": group("later", 2)}
    found = build_topology([given], [engine(rank(0, HEAD, 0))], table, [worker, actor()], [task()])
    assert list(format_lines(found)) == [
        "node 10.0.0.1 (h): 6 NPUs, 0 free",
        "  NPU 0   engine zen/dp1 rank 0 (bundle 0, pid 100)",
        "  NPU 1   actor Trainer (pid 5, job 02)",
        *(f"  NPU {number}   -" for number in range(2, 6)),
        "  1 of the NPUs without an owner: held by task f (pid 9, job 03)",
        "  2 of the NPUs without an owner: reserved by placement group bb (later)",
        "  1 of the NPUs without an owner: held by others",
        (f"engine zen/dp1: 1 ranks on 10.0.0.1; driver 10.0.0.1 pid 7; placement group aa of {DEPLOYMENT}"),
        "placement group bb (later): 2 NPUs, not of an engine of this plugin",
    ]
    assert found.has_unknown_owners and not build_topology([node(HEAD, 1, 1, (0,))], [], {}).has_unknown_owners
