"""Which NPUs of its own node one data parallel rank has. Ranks never share NPUs: what does not fit is an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ray_ascend.devices.visible import VARIABLE, entries, listed, parse, rejected
from vllm_ray_ascend.errors import DeviceMappingError


@dataclass(frozen=True)
class RankRequest:
    """What is asked for one data parallel rank, and what its node offers.

    - ``local_dp_rank``: its number among the ranks of its node, from 0;
    - ``world_size``: NPUs of the whole rank, TP x PP x PCP;
    - ``local_world_size``: how many of these its node gives, fewer where a rank spans nodes;
    - ``visible``: the node's ASCEND_RT_VISIBLE_DEVICES, None or blank where it has no list;
    - ``device_ids``: what --device-ids names, as physical numbers; it stands in for the list;
    - ``count``: NPUs that the node has, None where nobody knows;
    - ``ranks_here``: ranks that this process hosts, None where nobody knows. Only a process that hosts one rank can
      have a list that was cut for this rank, as users of offline data parallelism do.
    """

    local_dp_rank: int
    world_size: int
    local_world_size: int
    visible: str | None = None
    device_ids: Sequence[int] | None = None
    count: int | None = None
    ranks_here: int | None = None

    @property
    def text(self) -> str | None:
        """The list to choose from, None where there is none. A blank one is none, as in vLLM: Ray makes such lists."""
        if self.device_ids is not None:
            return listed(self.device_ids)
        return self.visible if entries(self.visible) else None


def local_range(request: RankRequest) -> list[int]:
    """Physical numbers of the NPUs that the rank has on its node, in the order of the node's list.

    Stands in for vllm.v1.engine.utils.get_physical_gpu_ids_for_local_dp_rank. Unlike that, ranks that span nodes follow
    each other by what they have on this node; unlike vllm-ascend's patch of it (patch_dp_device_ids.py), a list that is
    too short is never taken from its start again. Raises DeviceMappingError where the node has not enough NPUs.
    """
    _check(request)
    offered = _offered(request)
    start, stop = _span(request)
    if offered is None:
        return list(range(start, stop))
    if _is_cut(request, offered):
        return offered
    if stop > len(offered):
        raise DeviceMappingError(_shortage(request, len(offered)))
    return offered[start:stop]


def _check(request: RankRequest) -> None:
    if request.local_dp_rank < 0:
        raise DeviceMappingError(
            f"Data parallel ranks of a node count from 0, this one has {request.local_dp_rank}. Set VLLM_DP_RANK_LOCAL "
            "to the rank's number among those of its node."
        )
    if not 0 < request.local_world_size <= request.world_size:
        raise DeviceMappingError(
            f"A data parallel rank of {request.world_size} NPUs cannot have {request.local_world_size} of them on this "
            "node. Check --tensor-parallel-size, --pipeline-parallel-size and --nnodes."
        )


def _offered(request: RankRequest) -> list[int] | None:
    """The usable NPUs of the node, None where neither a list nor a count says."""
    if request.text is None and request.count is None:
        return None
    return parse(request.text, _limit(request))


def _is_cut(request: RankRequest, offered: Sequence[int]) -> bool:
    named = len(entries(request.text) or ())
    return request.ranks_here == 1 and named == len(offered) == request.local_world_size


def _limit(request: RankRequest) -> int:
    return sys.maxsize if request.count is None else request.count


def _span(request: RankRequest) -> tuple[int, int]:
    start = request.local_dp_rank * request.local_world_size
    return start, start + request.local_world_size


def _shortage(request: RankRequest, usable: int) -> str:
    start, stop = _span(request)
    wrong = rejected(request.text, _limit(request))
    spoiled = f", because it {wrong}" if wrong else ""
    needs = f"Data parallel rank {request.local_dp_rank} of this node needs its NPUs [{start}, {stop})"
    return f"{needs}, but {_source(request)} has {usable}{spoiled}. {_remedy(request, usable)}"


def _source(request: RankRequest) -> str:
    if request.device_ids is not None:
        return f"--device-ids {request.text}"
    return f"the node (without {VARIABLE})" if request.text is None else f"{VARIABLE}={request.text}"


def _remedy(request: RankRequest, usable: int) -> str:
    _, stop = _span(request)
    fitting = usable // request.local_world_size
    if fitting:
        fewer = f"Run fewer ranks on this node: --data-parallel-size-local {fitting}"
    else:
        fewer = (
            "Make the rank smaller with --tensor-parallel-size or --pipeline-parallel-size, let it span nodes with "
            "--data-parallel-backend ray and VLLM_RAY_DP_PACK_STRATEGY=span"
        )
    if request.device_ids is not None:
        return f"{fewer}, or name at least {stop} NPUs in --device-ids."
    if request.text is None:
        return f"{fewer}, or use a node with at least {stop} NPUs."
    return f"{fewer}, or name at least {stop} NPUs of the node in {VARIABLE}, or unset it."
