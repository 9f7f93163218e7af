"""The driver's side of data parallelism over Ray: where each engine core goes, and which variables go with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from vllm import envs
from vllm.v1.engine.utils import CoreEngineActorManager, get_env_vars_to_copy

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.cluster.connect import audit_nodes, connect
from vllm_ray_ascend.cluster.groups import Wanted, free_npus, release, reserve
from vllm_ray_ascend.cluster.placement import DpRequest, Placed, RankPlacement, plan, plan_scale_up
from vllm_ray_ascend.cluster.registry import running, unheeded_list
from vllm_ray_ascend.cluster.waiting import until
from vllm_ray_ascend.compat.rebind import with_globals
from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.engine.device_ids import refuse_device_ids
from vllm_ray_ascend.engine.process import ENGINE_LIFELINE, driver_variable, node_address, variables_that_stay
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, travelling
from vllm_ray_ascend.lifecycle.hub import Hub, Loss
from vllm_ray_ascend.lifecycle.messages import STOP
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_GRANT_LIMIT_S = 60.0
_ENGINE_GRACE_S = 3.0
"""Seconds that an engine core may take beside its workers' end."""


class RayAscendEngineActorManager(CoreEngineActorManager):
    """vLLM's manager of engine core actors, with our placement and our rule for variables."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.placements: list[RankPlacement] = []
        self._kind = current().kind
        start = with_globals(
            CoreEngineActorManager.__init__,
            get_env_vars_to_copy=_variables_to_copy,
            CoreEngineActorManager=SimpleNamespace(create_dp_placement_groups=self._create_groups),
        )
        connect(vllm_config.parallel_config)
        self._hub = Hub(node_address(), load().silence_s, _lost)
        try:
            with _variables({DRIVER_VARIABLE: driver_variable(), ENGINE_LIFELINE: self._hub.text()}):
                start(self, vllm_config, *args, **kwargs)
        except BaseException:
            self._undo_start()
            raise
        self._compare_own_list(vllm_config)

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine cores in order, and kill what is left as upstream does, which kills at once."""
        self.manager_stopped.set()
        self._hub.order(STOP)
        late = self._hub.wait_until_gone(load().stop_grace_s + _ENGINE_GRACE_S)
        if late:
            logger.warning("engine cores %s did not end in time and are killed", late)
        self._hub.close()
        super().shutdown(timeout)

    def add_dp_placement_groups(self, old_vllm_config: Any, new_data_parallel_size: int) -> tuple[list[Any], list[int]]:
        """Groups of ranks that elastic scale-up adds, each pinned to the node for which its local rank was computed.

        Raises PlacementError where they do not fit; then none is made.
        """
        config = old_vllm_config.parallel_config
        current = [
            Placed(placement.dp_rank, placement.local_dp_rank, placement.control_address)
            for placement in self.placements[: len(self.created_placement_groups)]
        ]
        added = plan_scale_up(
            current,
            new_data_parallel_size,
            config.world_size,
            config.data_parallel_master_ip,
            free_npus(self._kind),
            _allowed_addresses(),
            self._kind,
        )
        groups = reserve(_wanted(old_vllm_config, added, self._kind), _GRANT_LIMIT_S)
        self.placements[len(current) :] = added
        return groups, [placement.local_dp_rank for placement in added]

    def _create_groups(self, vllm_config: Any) -> tuple[list[Any], list[int]]:
        config = vllm_config.parallel_config
        refuse_device_ids(config, self._kind)
        request = _request(config, self._kind)
        self.placements = until(lambda: plan(request, free_npus(self._kind)), load().npu_wait_s)
        if self._kind is NPU:
            audit_nodes({address for placement in self.placements for address in placement.bundle_addresses})
        groups = reserve(_wanted(vllm_config, self.placements, self._kind), _GRANT_LIMIT_S)
        return groups, [placement.local_dp_rank for placement in self.placements]

    def _compare_own_list(self, vllm_config: Any) -> None:
        """Say so where this process's visible list is not what its engines on this node have."""
        import ray

        ours = {f"{vllm_config.instance_id}{suffix}" for suffix in ("", *(f"_dp{p.dp_rank}" for p in self.placements))}
        records = [record for record in running() if record.engine in ours]
        note = unheeded_list(os.environ.get(self._kind.variable), ray.util.get_node_ip_address(), records, self._kind)
        if note:
            logger.warning("%s", note)

    def _undo_start(self) -> None:
        """Kill the engine cores that were started, whose workers die with them, and give their NPUs back."""
        import ray

        self._hub.close()
        for actor in [*getattr(self, "local_engine_actors", ()), *getattr(self, "remote_engine_actors", ())]:
            ray.kill(actor)
        release(getattr(self, "created_placement_groups", ()))


def _request(config: Any, kind: Kind) -> DpRequest:
    return DpRequest(
        dp_size=config.data_parallel_size,
        dp_size_local=config.data_parallel_size_local,
        world_size=config.world_size,
        master_address=config.data_parallel_master_ip,
        strategy=getattr(envs, "VLLM_RAY_DP_PACK_STRATEGY", "strict"),
        allowed_addresses=_allowed_addresses(),
        all2all_backend=config.all2all_backend,
        kind=kind,
    )


def _allowed_addresses() -> frozenset[str]:
    text = getattr(envs, "VLLM_RAY_DP_PLACEMENT_NODE_IPS", "")
    return frozenset(filter(None, map(str.strip, text.split(","))))


def _wanted(vllm_config: Any, placements: Collection[RankPlacement], kind: Kind) -> list[Wanted]:
    return [
        Wanted(f"{vllm_config.instance_id}_dp{placement.dp_rank}", placement.bundles(kind.key), placement.strategy)
        for placement in placements
    ]


def _variables_to_copy(*args: Any, exclude_vars: set[str] | None = None, **kwargs: Any) -> set[str]:
    """vLLM's choice of variables for engine core actors, less the node's, plus those of the NPU stack that travel."""
    stay = variables_that_stay()
    names: set[str] = get_env_vars_to_copy(*args, exclude_vars=(exclude_vars or set()) | stay, **kwargs)
    return names | travelling(os.environ) | {DRIVER_VARIABLE, ENGINE_LIFELINE}


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Have ``values`` in the environment, from which upstream copies."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _lost(loss: Loss) -> None:
    """Ray tells vLLM of it, which ends the others; the log says which one it was."""
    logger.info("the engine core of data parallel rank %d (process %d, %s) ended", loss.rank, loss.pid, loss.where)
