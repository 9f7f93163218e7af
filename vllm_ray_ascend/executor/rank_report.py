"""The report of each rank after the startup: the engine's record, its check against other engines, its log line."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.cluster.registry import EngineRecord, RankRecord, claims_of_engine, running_engines
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.owners import check_claims
from vllm_ray_ascend.engine.process import node_address, node_id


def create_engine_record(executor: Any) -> EngineRecord:
    """Return the registry's record of a RayAscendExecutor whose ranks have reported."""
    from vllm import envs

    config = executor.parallel_config
    handles = {handle.rank: handle for handle in executor.ray_worker_handles}
    sizes = executor._get_parallel_sizes()
    ranks = tuple(
        RankRecord(
            rank=rank.rank,
            local_rank=handles[rank.rank].local_rank,
            address=rank.address,
            visible_index=rank.visible_index,
            physical_id=rank.physical_id,
            bundle_index=handles[rank.rank].bundle_id_idx,
            pid=rank.pid,
            actor_name=executor._build_actor_name(executor.vllm_config.instance_id, rank.rank, *sizes),
            node_id=rank.node_id,
        )
        for rank in sorted(executor.ranks, key=lambda rank: rank.rank)
    )
    return EngineRecord(
        engine=executor.vllm_config.instance_id,
        dp_rank=config.data_parallel_index,
        model=str(executor.vllm_config.model_config.served_model_name or executor.vllm_config.model_config.model),
        address=node_address(),
        pid=os.getpid(),
        group=config.placement_group.id.hex(),
        share=envs.VLLM_RAY_PER_WORKER_GPUS,
        started=time.time(),
        ranks=ranks,
        device_key=current_accelerator().kind.key,
        node_id=node_id(),
        tensor_parallel=config.tensor_parallel_size,
        pipeline_parallel=config.pipeline_parallel_size,
    )


def check_owners(record: EngineRecord) -> None:
    """Raise DeviceMappingError where a rank opened an NPU of another rank, of this engine or of a running one."""
    others = [other for other in running_engines() if (other.engine, other.dp_rank) != (record.engine, record.dp_rank)]
    check_claims([claim for each in (*others, record) for claim in claims_of_engine(each)])


@dataclass(frozen=True)
class RankReport:
    """One worker: its rank in the engine, its node's address, visible and physical number of its NPU, its process.

    ``node_id`` is Ray's id of its node.
    """

    rank: int
    address: str
    visible_index: int
    physical_id: int
    pid: int
    device_key: str = NPU.key
    node_id: str = ""


def report_rank(worker: Any) -> RankReport:
    """Return the report of ``worker``. Called by collective_rpc, in the thread that opened the NPU."""
    accelerator = current_accelerator()
    visible_index = accelerator.get_opened_device()
    return RankReport(
        rank=worker.rank,
        address=node_address(),
        visible_index=visible_index,
        physical_id=accelerator.physical_device_id(visible_index),
        pid=os.getpid(),
        device_key=accelerator.kind.key,
        node_id=node_id(),
    )


def format_ready_line(version: str, stack: Mapping[str, str], ranks: Sequence[RankReport]) -> str:
    """Return the log line of a successful startup: versions, nodes, NPUs, and the node and NPU of every rank."""
    nodes = {rank.node_id or rank.address for rank in ranks}
    npus = {(rank.node_id or rank.address, rank.physical_id) for rank in ranks}
    placements = ", ".join(
        f"rank {rank.rank} -> {rank.address} {rank.device_key} {rank.visible_index} (physical {rank.physical_id})"
        for rank in sorted(ranks, key=lambda rank: rank.rank)
    )
    versions = ", ".join(f"{name} {number}" for name, number in stack.items() if number != "not installed")
    device = ranks[0].device_key if ranks else NPU.key
    counts = f"{_format_count(nodes, 'node')}, {_format_count(npus, device)}"
    return f"vllm-ray-ascend {version} ready: {versions}; {counts}; {placements}"


def _format_count(items: set[Any], name: str) -> str:
    return f"{len(items)} {name}{'' if len(items) == 1 else 's'}"
