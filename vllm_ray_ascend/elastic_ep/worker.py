"""vllm-ascend's worker, in an engine that can be scaled. The only file here that knows its model runner.

vLLM imports it by its name, which the platform's check of the configuration sets.
"""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.config import set_current_vllm_config
from vllm_ascend.distributed.eplb.eplb_state import AscendEplbState
from vllm_ascend.worker.worker import NPUWorker

from vllm_ray_ascend import patches
from vllm_ray_ascend.elastic_ep import block_tables, experts, groups, layers
from vllm_ray_ascend.elastic_ep.rendezvous import announce
from vllm_ray_ascend.elastic_ep.scaling import NpuScalingExecutor

_INIT_GROUPS = "vllm_ascend.worker.worker.NPUWorker._init_worker_distributed_environment"


class ElasticNPUWorker(NPUWorker):
    """NPUWorker with stateless groups, experts that can move, and vLLM's call `elastic_ep_execute`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in (groups, layers, experts, block_tables):
            part.install()
        self.elastic_ep_executor = NpuScalingExecutor(self)

    def elastic_ep_execute(self, execute_method: str, *args: Any, **kwargs: Any) -> Any:
        """Do a step of a scaling, as vLLM's worker."""
        return self.elastic_ep_executor.execute(execute_method, *args, **kwargs)

    def load_model(self) -> None:
        """Load the model as upstream, then create the state of its expert load balancing, as vLLM's model runner."""
        super().load_model()
        runner = self.model_runner
        with set_current_vllm_config(self.vllm_config):
            runner.eplb_state = AscendEplbState(self.parallel_config, self.device)
            runner.eplb_state.add_model(runner.get_model(), self.model_config)

    def shutdown(self) -> None:
        """Shut down as upstream, once retired groups are destroyed."""
        self.elastic_ep_executor.shutdown()
        super().shutdown()

    def _init_worker_distributed_environment(self) -> None:
        config = self.parallel_config
        if envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH:
            rank = config.data_parallel_rank * config.world_size + self.rank
            announce(config.data_parallel_master_ip, config._coord_store_port, "workers", rank)
        init = patches.with_globals(
            _INIT_GROUPS, super()._init_worker_distributed_environment, init_ascend_model_parallel=groups.init_mc2_group
        )
        init(self)
