"""The three numbers of one NPU: physical, visible, logical.

- *physical*: as the driver of the node counts (inside a container, as the container's driver does);
- *visible*: the place in what this process sees, which torch_npu calls ``npu:N``;
- *logical*: the place in what this engine was assigned, vLLM's local rank.

``usable`` are the physical numbers that a process sees, in the order of its list; ``assigned`` those of an engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ray_ascend.devices.visible import VARIABLE, listed
from vllm_ray_ascend.errors import DeviceMappingError


def visible_of_physical(usable: Sequence[int], physical: int) -> int:
    """Visible number of a physical NPU. Raises DeviceMappingError where this process does not see it."""
    if physical in usable:
        return usable.index(physical)
    mended = listed(sorted({*usable, physical}))
    raise DeviceMappingError(
        f"Physical NPU {physical} is not visible here: this process sees {_npus(usable)}. On this node `ray stop`, "
        f"then `{VARIABLE}={mended} ray start ...`, or unset {VARIABLE} before `ray start`."
    )


def physical_of_visible(usable: Sequence[int], visible: int) -> int:
    """Physical number of a visible NPU. Raises DeviceMappingError where this process does not see so many."""
    if 0 <= visible < len(usable):
        return usable[visible]
    raise DeviceMappingError(
        f"Visible NPU {visible} does not exist here: this process sees {_npus(usable)}{_run(usable)}. Use one of them, "
        f"or on this node `ray stop`, name more NPUs in {VARIABLE}, and `ray start ...`."
    )


def physical_of_logical(assigned: Sequence[int], logical: int) -> int:
    """Physical number of a logical NPU. Raises DeviceMappingError where the engine has not so many."""
    if 0 <= logical < len(assigned):
        return assigned[logical]
    raise DeviceMappingError(
        f"Logical NPU {logical} does not exist: this engine was assigned {_npus(assigned)}{_run(assigned)}. Assign it "
        "more NPUs, or lower --tensor-parallel-size or --pipeline-parallel-size."
    )


def visible_of_logical(assigned: Sequence[int], usable: Sequence[int], logical: int) -> int:
    """Visible number of a logical NPU, what torch_npu needs. Raises DeviceMappingError as the two steps do."""
    return visible_of_physical(usable, physical_of_logical(assigned, logical))


def _npus(physical: Sequence[int]) -> str:
    return f"physical NPUs {listed(physical)}" if physical else "no NPU"


def _run(physical: Sequence[int]) -> str:
    return f", numbered from 0 to {len(physical) - 1}" if physical else ""
