"""Which NPUs of its own node a data parallel rank has. Ranks never share NPUs: what does not fit is an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.visible import (
    VISIBLE_DEVICES,
    format_ids,
    invalid_entry,
    split_entries,
    usable_physical_ids,
)
from vllm_ray_ascend.errors import DeviceMappingError


@dataclass(frozen=True)
class RankRequest:
    """What one data parallel rank needs, and what its node offers.

    - ``local_dp_rank``: its number among the ranks of its node, from 0;
    - ``world_size``: NPUs of the whole rank, TP x PP x PCP;
    - ``local_world_size``: how many of these are on its node, fewer where a rank spans nodes;
    - ``visible_devices``: the node's ASCEND_RT_VISIBLE_DEVICES, None or blank where it has no list;
    - ``requested_physical_ids``: the physical ids given with --device-ids; they replace the list;
    - ``npu_count``: NPUs that the node has, None where that is not known;
    - ``ranks_in_process``: ranks that this process hosts, None where that is not known. Only a process that hosts one
      rank can have a list that was cut for this rank, as users of offline data parallelism do.
    """

    local_dp_rank: int
    world_size: int
    local_world_size: int
    visible_devices: str | None = None
    requested_physical_ids: Sequence[int] | None = None
    npu_count: int | None = None
    ranks_in_process: int | None = None

    @property
    def device_list(self) -> str | None:
        """The list to choose from, None where there is none. A blank one is none, as in vLLM: Ray makes such lists."""
        if self.requested_physical_ids is not None:
            return format_ids(self.requested_physical_ids)
        return self.visible_devices if split_entries(self.visible_devices) else None

    @property
    def id_limit(self) -> int:
        """Physical ids lie below this; where the node's NPUs are not known, any id is possible."""
        return sys.maxsize if self.npu_count is None else self.npu_count

    @property
    def positions(self) -> tuple[int, int]:
        """First position in the node's list that belongs to the rank, and the first after it that does not."""
        start = self.local_dp_rank * self.local_world_size
        return start, start + self.local_world_size


def physical_ids_of_rank(request: RankRequest) -> list[int]:
    """Return the physical ids of the NPUs that the rank has on its node, in the order of the node's list.

    Replaces vllm.v1.engine.utils.get_physical_gpu_ids_for_local_dp_rank. Unlike that, ranks that span nodes follow
    each other by what they have on this node; unlike vllm-ascend's patch of it (patch_dp_device_ids.py), a list that is
    too short is never read again from its start. Raises DeviceMappingError where the node has too few NPUs.
    """
    _validate_request(request)
    start, stop = request.positions
    if request.device_list is None and request.npu_count is None:
        return list(range(start, stop))
    offered_ids = usable_physical_ids(request.device_list, request.id_limit)
    if _is_list_of_this_rank(request, offered_ids):
        return offered_ids
    if stop > len(offered_ids):
        raise DeviceMappingError("VRA-254", _shortage_message(request, len(offered_ids)))
    return offered_ids[start:stop]


def _validate_request(request: RankRequest) -> None:
    if request.local_dp_rank < 0:
        raise DeviceMappingError(
            "VRA-252",
            f"Data parallel ranks of a node count from 0, this one has {request.local_dp_rank}. Set VLLM_DP_RANK_LOCAL "
            "to the rank's number among those of its node.",
        )
    if not 0 < request.local_world_size <= request.world_size:
        raise DeviceMappingError(
            "VRA-253",
            f"A data parallel rank of {request.world_size} NPUs cannot have {request.local_world_size} of them on this "
            "node. Check --tensor-parallel-size, --pipeline-parallel-size and --nnodes.",
        )


def _is_list_of_this_rank(request: RankRequest, offered_ids: Sequence[int]) -> bool:
    """Return whether the list was cut for this rank: it has exactly the rank's NPUs, and no other rank reads it."""
    named = len(split_entries(request.device_list) or ())
    return request.ranks_in_process == 1 and named == len(offered_ids) == request.local_world_size


def _shortage_message(request: RankRequest, usable_count: int) -> str:
    start, stop = request.positions
    error = invalid_entry(request.device_list, request.id_limit)
    cause = f", because it {error}" if error else ""
    needs = f"Data parallel rank {request.local_dp_rank} of this node needs its NPUs [{start}, {stop})"
    return (
        f"{needs}, but {_describe_source(request)} has {usable_count}{cause}. {_suggest_remedy(request, usable_count)}"
    )


def _describe_source(request: RankRequest) -> str:
    if request.requested_physical_ids is not None:
        return f"--device-ids {request.device_list}"
    if request.device_list is None:
        return f"the node (without {VISIBLE_DEVICES})"
    return f"{VISIBLE_DEVICES}={request.device_list}"


def _suggest_remedy(request: RankRequest, usable_count: int) -> str:
    _, stop = request.positions
    fitting = usable_count // request.local_world_size
    if fitting:
        fewer = f"Run fewer ranks on this node: --data-parallel-size-local {fitting}"
    else:
        fewer = (
            "Make the rank smaller with --tensor-parallel-size or --pipeline-parallel-size, let it span nodes with "
            "--data-parallel-backend ray and VLLM_RAY_DP_PACK_STRATEGY=span"
        )
    if request.requested_physical_ids is not None:
        return f"{fewer}, or name at least {stop} NPUs in --device-ids."
    if request.device_list is None:
        return f"{fewer}, or use a node with at least {stop} NPUs."
    return f"{fewer}, or name at least {stop} NPUs of the node in {VISIBLE_DEVICES}, or unset it."
