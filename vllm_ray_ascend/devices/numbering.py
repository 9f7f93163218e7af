"""The three numberings of one NPU: physical, visible, logical.

- *physical id*: as the driver of the node counts (inside a container, as the container's driver does);
- *visible index*: the position in what this process sees, which torch_npu calls ``npu:N``;
- *logical index*: the position in what this engine was assigned, vLLM's local rank.

``usable_ids`` are the physical ids that a process sees, in the order of its list; ``assigned_ids`` the physical ids
that Ray assigned to an engine, in the order of its local ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, format_ids
from vllm_ray_ascend.errors import DeviceMappingError


def physical_to_visible(usable_ids: Sequence[int], physical_id: int) -> int:
    """Return the visible index of a physical NPU. Raises DeviceMappingError where this process does not see it."""
    if physical_id in usable_ids:
        return usable_ids.index(physical_id)
    extended = format_ids(sorted({*usable_ids, physical_id}))
    raise DeviceMappingError(
        "VRA-245",
        f"Physical NPU {physical_id} is not visible here: this process sees {_describe_ids(usable_ids)}. On this node "
        f"`ray stop`, then `{VISIBLE_DEVICES}={extended} ray start ...`, or unset {VISIBLE_DEVICES} before `ray "
        "start`.",
    )


def visible_to_physical(usable_ids: Sequence[int], visible_index: int) -> int:
    """Return the physical id of a visible NPU. Raises DeviceMappingError where this process sees fewer NPUs."""
    if 0 <= visible_index < len(usable_ids):
        return usable_ids[visible_index]
    raise DeviceMappingError(
        "VRA-246",
        f"Visible NPU {visible_index} does not exist here: this process sees {_describe_ids(usable_ids)}"
        f"{_describe_indices(usable_ids)}. Use one of them, or on this node `ray stop`, name more NPUs in "
        f"{VISIBLE_DEVICES}, and `ray start ...`.",
    )


def logical_to_physical(assigned_ids: Sequence[int], logical_index: int) -> int:
    """Return the physical id of a logical NPU. Raises DeviceMappingError where the engine has fewer NPUs."""
    if 0 <= logical_index < len(assigned_ids):
        return assigned_ids[logical_index]
    raise DeviceMappingError(
        "VRA-247",
        f"Logical NPU {logical_index} does not exist: this engine was assigned {_describe_ids(assigned_ids)}"
        f"{_describe_indices(assigned_ids)}. Assign it more NPUs, or lower --tensor-parallel-size or "
        "--pipeline-parallel-size.",
    )


def logical_to_visible(assigned_ids: Sequence[int], usable_ids: Sequence[int], logical_index: int) -> int:
    """Return the visible index of a logical NPU, which torch_npu takes. Raises DeviceMappingError as the two steps."""
    return physical_to_visible(usable_ids, logical_to_physical(assigned_ids, logical_index))


def _describe_ids(physical_ids: Sequence[int]) -> str:
    return f"physical NPUs {format_ids(physical_ids)}" if physical_ids else "no NPU"


def _describe_indices(physical_ids: Sequence[int]) -> str:
    return f", numbered from 0 to {len(physical_ids) - 1}" if physical_ids else ""
