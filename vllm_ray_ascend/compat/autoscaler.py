"""Whether something adds nodes to the Ray cluster on demand; Ray 2.48 to 2.60 say so in no public way.

Every head reports as an autoscaler would, for `ray status`: also that of `ray start --head` alone, whose "read-only"
provider only mirrors nodes that join by themselves. Version 1 (`ray up` until 2.50, KubeRay's default) reports node
types: those of the read-only one are named after single nodes. Version 2 knows nodes by the instance ids of its
provider: a node that nobody made has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vllm_ray_ascend.errors import UpstreamChangedError

_STATUS_KEY = "__autoscaling_status"
_RPC_LIMIT_S = 10
_READ_ONLY_TYPE = re.compile(r"node_[0-9a-f]{56}")


def find_autoscaler() -> str:
    """Return which autoscaler the joined cluster has; empty where nodes join by themselves only.

    Raises UpstreamChangedError where Ray no longer says so where it is looked for.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        if is_autoscaler_v2(fetch_from_server=True):
            return _describe_v2(ray.get_runtime_context().gcs_address)
        return describe_v1(json.loads(_internal_kv_get(_STATUS_KEY) or b"{}"))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UpstreamChangedError(
            "VRA-260",
            f"Whether the Ray cluster has an autoscaler cannot be determined: {type(error).__name__}: {error}. Install "
            "a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend.",
        ) from error


def describe_v1(status: Mapping[str, Any]) -> str:
    """Return the autoscaler of a version 1 report, with its node types; empty for the read-only one, and for none."""
    report = status.get("autoscaler_report") or {}
    types = sorted(name for name in report.get("active_nodes") or {} if not _READ_ONLY_TYPE.fullmatch(name))
    return f"Ray's autoscaler, version 1 (node types now: {', '.join(types)})" if types else ""


def _describe_v2(gcs_address: str) -> str:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(GcsClient(gcs_address).get_cluster_status(timeout_s=_RPC_LIMIT_S))
    return describe_v2(reply)


def describe_v2(reply: Any) -> str:
    """Return the autoscaler of a version 2 report, Ray's GetClusterStatusReply; empty for the read-only one."""
    has_reported = reply.autoscaling_state.autoscaler_state_version > 0
    if not has_reported or not any(node.instance_id for node in reply.cluster_resource_state.node_states):
        return ""
    types = {node.ray_node_type_name or node.instance_type_name for node in reply.cluster_resource_state.node_states}
    return f"Ray's autoscaler, version 2 (node types now: {', '.join(sorted(filter(None, types))) or 'unnamed'})"
