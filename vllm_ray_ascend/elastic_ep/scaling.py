"""What a worker does when its engine is scaled: vLLM's steps, on NPUs."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.distributed import get_dp_group
from vllm.distributed.elastic_ep.elastic_execute import ElasticEPScalingExecutor
from vllm.distributed.elastic_ep.standby_state import (
    get_standby_dp_group,
    get_standby_ep_group,
    get_standby_eplb_group,
    pop_standby_groups,
)
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.utils import is_moe_layer

from vllm_ray_ascend.acl_graphs.release import release
from vllm_ray_ascend.elastic_ep import groups, layers
from vllm_ray_ascend.elastic_ep.groups import NpuStatelessGroup
from vllm_ray_ascend.elastic_ep.rendezvous import wait_for_announcements
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

_ROLL_BACK_S = 0.2
"""How long rolling a preparation back keeps a worker from serving, each time that it is asked for."""


class NpuScalingExecutor(ElasticEPScalingExecutor):
    """vLLM's scaling of a worker, with vllm-ascend's groups, layers and graphs.

    A worker that joins loads its model from the file, as all others did; only experts are moved between NPUs. It
    connects all groups before that, so that nobody waits in HCCL for a model to be loaded.
    """

    _async_future: Any

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self._standby_mc2: NpuStatelessGroup | None = None
        self._retired_mc2: NpuStatelessGroup | None = None
        self._rolled_back = threading.Event()

    def load_model(self) -> None:
        """Load the model of a worker that joins."""
        self.worker.load_model()

    def prepare_reconfiguration(self, reconfig_request: Any, use_all2all: bool) -> None:
        """Create and connect the groups of the new size, once workers that join have come to do the same."""
        config = self.worker.vllm_config.parallel_config
        joining = range(
            get_dp_group().world_size * config.world_size,
            reconfig_request.new_data_parallel_size * config.world_size,
        )
        host, port = reconfig_request.new_data_parallel_master_ip, reconfig_request.coord_store_port
        wait_for_announcements(host, port, "workers", joining, self._rolled_back)
        super().prepare_reconfiguration(reconfig_request, use_all2all)

    def roll_back(self) -> bool:
        """Undo what was prepared. Return whether that is done; where not, it has to be called again."""
        self._rolled_back.set()
        future = self._async_future
        if future is not None and wait([future], _ROLL_BACK_S).not_done:
            return False
        if future is not None and (error := future.exception()) is not None:
            logger.info("the preparation of a scaling had ended with %s: %s", type(error).__name__, error)
        self._async_future = self._prepared_eplb_communicator = None
        self._staged_moe_quant_methods.clear()
        self._wait_for_group_cleanup()
        standby = pop_standby_groups()
        mc2, self._standby_mc2 = self._standby_mc2, None
        self._start_group_cleanup((standby["dp"], standby["ep"], standby["world"], standby["eplb"], mc2))
        self._rolled_back.clear()
        return True

    def transfer_weights(self, old_dp_size: int, new_dp_size: int) -> None:
        """Send nothing: see the class."""

    def prepare_new_worker(self) -> None:
        """Receive nothing: see the class."""

    def warmup_new_worker(self) -> None:
        """Do nothing: vllm-ascend's warm-up needs the other ranks, and is part of the commit."""

    def switch_and_prepare(self) -> tuple[GroupCoordinator | None, ...]:
        """Switch to the prepared groups, and return those that were in use."""
        self._retired_mc2, self._standby_mc2 = groups.replace_mc2_group(self._standby_mc2), None
        retired: tuple[GroupCoordinator | None, ...] = super().switch_and_prepare()
        runner = self.worker.model_runner
        runner.dp_size, runner.dp_rank = get_dp_group().world_size, get_dp_group().rank_in_group
        runner.eplb_state.__dict__.pop("_rank_node_ids", None)  # vllm-ascend's record of which rank is on which node
        with set_current_vllm_config(self.worker.vllm_config):
            layers.rebuild_communication(module for module in runner.get_model().modules() if is_moe_layer(module))
        return retired

    def switch_and_remove(self) -> None:
        """Leave all groups."""
        self._retired_mc2 = groups.replace_mc2_group(None)
        super().switch_and_remove()

    def _prepare_eplb_communicator(self, eplb_group: Any) -> None:
        """Create the standby group of vllm-ascend as well, after vLLM's: the order in which new workers create them."""
        request = self.reconfig_request
        self._standby_mc2 = groups.create_mc2_group(
            get_standby_ep_group(), request.new_data_parallel_master_ip, request.coord_store_port
        )
        super()._prepare_eplb_communicator(eplb_group)

    def _warm_target_groups(self, dp_group: Any, ep_group: Any) -> None:
        """Connect the standby groups, in the order in which a new worker does."""
        groups.connect(ep_group, self._standby_mc2, get_standby_eplb_group(), get_standby_dp_group())

    def _start_group_cleanup(self, groups: tuple[GroupCoordinator | None, ...]) -> None:
        retired, self._retired_mc2 = self._retired_mc2, None
        super()._start_group_cleanup((*groups, retired))

    def _destroy_retired_groups(self, groups: tuple[GroupCoordinator | None, ...]) -> None:
        for group in groups:
            try:
                super()._destroy_retired_groups((group,))
            except Exception as error:  # noqa: BLE001  whatever it is, the next scaling does not depend on it
                logger.warning("VRA-348: a group that is no longer used could not be destroyed: %s", error)

    def _release_cuda_graphs(self) -> None:
        release(self.worker)
