"""What Ray knows of the cluster but offers only by private names, all of which vLLM uses as well."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.errors import UpstreamChangedError


def available_per_node() -> dict[str, dict[str, float]]:
    """Free resources of every live node, by node id; in Ray 2.48 to 2.60 the same name.

    Raises UpstreamChangedError where Ray no longer has it.
    """
    try:
        from ray._private.state import available_resources_per_node
    except ImportError as error:
        raise UpstreamChangedError(
            "ray._private.state no longer has available_resources_per_node, which vLLM and vllm-ray-ascend use. "
            "Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend."
        ) from error
    found: dict[str, Any] = available_resources_per_node()
    return found


def kept_values() -> Any:
    """Ray's internal key-value store, which lives in its control store (GCS): `ray.experimental.internal_kv`.

    Raises UpstreamChangedError where Ray no longer has it.
    """
    from ray.experimental import internal_kv

    names = ("_internal_kv_put", "_internal_kv_get", "_internal_kv_del", "_internal_kv_list")
    gone = [name for name in names if not hasattr(internal_kv, name)]
    if gone:
        raise UpstreamChangedError(
            f"ray.experimental.internal_kv no longer has {', '.join(gone)}, where vllm-ray-ascend keeps which engine "
            "runs where. Install a Ray from 2.48 to 2.60, or a newer vllm-ray-ascend."
        )
    return internal_kv
