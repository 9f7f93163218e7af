"""What an engine that has started says of itself, and whether somebody else says the same of an NPU."""

from __future__ import annotations

import os
import time
from typing import Any

from vllm import envs

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims, running
from vllm_ray_ascend.devices.owners import check_claims


def record_of(executor: Any) -> EngineRecord:
    """The record of a RayAscendExecutor whose ranks have reported."""
    import ray

    config = executor.parallel_config
    handles = {handle.rank: handle for handle in executor.ray_worker_handles}
    sizes = executor._get_parallel_sizes()
    ranks = tuple(
        RankRecord(
            rank=rank.rank,
            local_rank=handles[rank.rank].local_rank,
            address=rank.address,
            visible=rank.visible,
            physical=rank.physical,
            bundle=handles[rank.rank].bundle_id_idx,
            pid=rank.pid,
            actor=executor._actor_name(executor.vllm_config.instance_id, rank.rank, *sizes),
        )
        for rank in sorted(executor.ranks, key=lambda rank: rank.rank)
    )
    return EngineRecord(
        engine=executor.vllm_config.instance_id,
        dp_rank=config.data_parallel_index,
        model=str(executor.vllm_config.model_config.served_model_name or executor.vllm_config.model_config.model),
        address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        group=config.placement_group.id.hex(),
        share=envs.VLLM_RAY_PER_WORKER_GPUS,
        started=time.time(),
        ranks=ranks,
        device=current().kind.key,
    )


def check_owners(record: EngineRecord) -> None:
    """Raise DeviceMappingError where a rank opened an NPU that another rank has, of this engine or of a running one."""
    others = [other for other in running() if (other.engine, other.dp_rank) != (record.engine, record.dp_rank)]
    check_claims([claim for each in (*others, record) for claim in claims(each)])
