"""Names of upstream that no source has, as they are compiled or made at import: looked up in the installed release.

ci/contract/facts.toml leaves them out ("<0"), and checks in every release how Ray's own sources use them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from ci.contract.facts import TABLE
from ci.matrix import toml

pytestmark = pytest.mark.unit

CHECKS = {
    "ray/_raylet": """
from ray import _raylet
client = getattr(_raylet, "InnerGcsClient", _raylet.GcsClient)  # to which GcsClient hands on what it lacks
found = ["GcsClient"] if callable(_raylet.GcsClient) else []
found += [name for name in ("get_cluster_status",) if "timeout_s" in (getattr(client, name).__doc__ or "")]
found += [name for name in ("get_actor_table", "get_task_events") if hasattr(_raylet.GlobalStateAccessor, name)]
""",
    "ray/core/generated/autoscaler_pb2": """
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
def fields(message, prefix):
    return {f"{prefix}.{field.name}": field.message_type for field in message.fields}
reply = fields(GetClusterStatusReply.DESCRIPTOR, "reply")
state = fields(reply["reply.autoscaling_state"], "autoscaling")
resources = fields(reply["reply.cluster_resource_state"], "resources")
found = [*reply, *state, *resources, *fields(resources["resources.node_states"], "node")]
GetClusterStatusReply.FromString(b"")
""",
    "ray/core/generated/common_pb2": """
from ray.core.generated import common_pb2
found = [*common_pb2.TaskStatus.keys(), *common_pb2.TaskType.keys()]
""",
    "ray/core/generated/gcs_pb2": """
from ray.core.generated import gcs_pb2
messages = [gcs_pb2.ActorTableData.DESCRIPTOR, gcs_pb2.TaskEvents.DESCRIPTOR]
messages += [field.message_type for field in messages[1].fields if field.name in ("task_info", "state_updates")]
found = [f"{message.name}.{field.name}" for message in messages for field in message.fields]
""",
}
"""For each module that is left out of facts.toml: code that sets ``found`` to what it has."""

NEEDED = {
    "ray/_raylet": {"GcsClient", "get_cluster_status", "get_actor_table", "get_task_events"},
    "ray/core/generated/autoscaler_pb2": {
        "reply.autoscaling_state",
        "reply.cluster_resource_state",
        "autoscaling.autoscaler_state_version",
        "resources.node_states",
        "node.instance_id",
        "node.ray_node_type_name",
        "node.instance_type_name",
    },
    "ray/core/generated/common_pb2": {"RUNNING", "FINISHED", "FAILED", "NORMAL_TASK"},
    "ray/core/generated/gcs_pb2": {
        *(f"ActorTableData.{name}" for name in ("class_name", "name", "ray_namespace", "pid", "job_id", "address")),
        *(f"ActorTableData.{name}" for name in ("owner_address", "placement_group_id", "resource_mapping")),
        *(f"TaskEvents.{name}" for name in ("task_info", "state_updates", "job_id")),
        *(f"TaskInfoEntry.{name}" for name in ("name", "type", "placement_group_id", "required_resources")),
        *(f"TaskStateUpdate.{name}" for name in ("worker_pid", "node_id", "state_ts_ns")),
    },
}
"""What compat/autoscaler.py and compat/ray_state.py use of each."""


def test_every_module_that_the_contract_cannot_read_is_looked_into() -> None:
    left_out = {name for name, releases in toml(TABLE)["imports"].items() if releases == "<0"}
    assert left_out == set(CHECKS) == set(NEEDED)


@pytest.mark.parametrize("module", CHECKS)
def test_the_installed_release_has_what_we_use(module: str) -> None:
    """In a process of its own: what Ray loads stays out of this one."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    code = f"import json\n{CHECKS[module]}\nprint(json.dumps(sorted(found)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not NEEDED[module] - set(json.loads(done.stdout.splitlines()[-1]))
