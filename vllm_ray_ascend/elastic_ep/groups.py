"""Process groups that are independent of torch's world, so that ranks can join and leave: vLLM's, on NPUs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.parallel_state import get_dp_group, get_ep_group, get_eplb_group, get_world_group
from vllm.distributed.stateless_coordinator import StatelessGroupCoordinator
from vllm.distributed.utils import get_cached_tcp_store_client
from vllm.platforms import current_platform
from vllm_ascend.distributed.device_communicators.npu_communicator import NPUCommunicator, _NpuAll2AllManager
from vllm_ascend.utils import create_hccl_pg_options

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.accelerators.npu import NpuAccelerator
from vllm_ray_ascend.hccl import types
from vllm_ray_ascend.hccl.library import Buffer, load_library
from vllm_ray_ascend.hccl.stream import AclStream

_MC2 = "vllm_ascend.distributed.parallel_state._MC2"

_GROUP_ID = "vllm_ray_ascend_group_id"
_SYNCHRONIZE_S = 1.0

_group_name: ContextVar[str] = ContextVar("vllm_ray_ascend_group_name", default="")
"""Name of the group that this thread creates: vLLM does not pass it to the platform."""


def install() -> None:
    """Let vLLM create its stateless groups with HCCL in this process."""
    patches.apply(
        "vllm.platforms.interface.Platform.stateless_init_device_torch_dist_pg",
        classmethod(_create_device_group),
        type(current_platform),
    )
    patches.apply("vllm.distributed.stateless_coordinator.StatelessGroupCoordinator", NpuStatelessGroup)


def create_mc2_group(group: StatelessGroupCoordinator, host: str, port: int) -> NpuStatelessGroup:
    """Return a group like the expert parallel ``group``, for vllm-ascend's fused MoE operators.

    All ranks of ``group`` call it, with host and port of the store at which they meet.
    """
    world = get_world_group()
    return NpuStatelessGroup(
        group_ranks=[group.ranks],
        local_rank=world.local_rank,
        torch_distributed_backend=world.backend,
        use_device_communicator=True,
        coord_store=get_cached_tcp_store_client(host, port),
        group_name="mc2",
        host=host,
        global_rank=world.rank,
        global_world_size=len(group.ranks),
    )


def init_mc2_group(parallel_config: Any, engram_config: Any = None) -> None:
    """Do what vllm-ascend's init_ascend_model_parallel does, over the ranks of all engines, and connect all groups."""
    host, port = parallel_config.data_parallel_master_ip, parallel_config._coord_store_port
    mc2 = create_mc2_group(get_ep_group(), host, port)
    replace_mc2_group(mc2)
    connect(get_ep_group(), mc2, get_eplb_group(), get_dp_group())


def replace_mc2_group(group: NpuStatelessGroup | None) -> NpuStatelessGroup | None:
    """Let ``group`` be vllm-ascend's MC2 group, and return the one that it was."""
    from vllm_ascend.distributed import parallel_state

    before: NpuStatelessGroup | None = parallel_state._MC2
    patches.apply(_MC2, group)
    return before


def connect(*groups: Any) -> None:
    """Create the HCCL communicators of ``groups`` and their links. All their ranks call it.

    HCCL makes the links in the first operation, which waits for the ranks, or fails. Through torch that would be in one
    of torch_npu's queues: what waits for an event waits for all queues, so that this rank would not serve meanwhile,
    and after a failure never again. So HCCL is called here, with a stream of its own. Raises HcclError.
    """
    accelerator, library, data_type = current_accelerator(), load_library(), types.reduction_data_type("int32", "sum")
    accelerator.bind_thread(groups[0].device.index)
    stream = AclStream()
    try:
        with accelerator.stream_context(accelerator.create_stream()):  # the device may be serving meanwhile
            for group in groups:
                value = torch.zeros(1, dtype=torch.int32, device=group.device)
                buffer = Buffer(value.data_ptr(), 1, data_type)
                communicator = _communicator(group)
                accelerator.current_stream().synchronize()  # `value` is this stream's until here
                library.all_reduce(buffer, buffer, types.REDUCE_OPS["sum"], communicator, stream.handle)
                while not stream.synchronize(_SYNCHRONIZE_S):
                    pass
    finally:
        stream.destroy()


def _communicator(group: Any) -> int:
    """Return the handle of a group's communicator, which is created where all ranks are here.

    An operation on no elements creates it, and is none to HCCL. `get_hccl_comm` could, but would let no other thread
    run meanwhile; what it takes is an NPU, by its visible index.
    """
    dist.all_reduce(torch.zeros(0, dtype=torch.int32, device=group.device), group=group.device_group)
    handle: int = group.device_group._get_backend(group.device).get_hccl_comm(group.device.index)
    return handle


class NpuStatelessGroup(StatelessGroupCoordinator):
    """vLLM's stateless group with NPUs: HCCL, and broadcasts of NPU tensors through host memory."""

    device_group: Any
    cpu_group: Any
    device_communicator: Any

    def __init__(
        self,
        *args: Any,
        use_device_communicator: bool,
        global_world_size: int = 1,
        use_all2all: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take upstream's arguments. All ranks of the group call it, and wait for each other."""
        with _named(kwargs.get("group_name") or "anonymous"):
            super().__init__(
                *args,
                use_device_communicator=False,  # upstream insists on CUDA's
                global_world_size=global_world_size,
                use_all2all=use_all2all,
                **kwargs,
            )
        accelerator = current_accelerator()
        self.device = accelerator.torch_device(accelerator.current_device())
        self.use_device_communicator = use_device_communicator
        self.use_custom_op_call = True  # as in vllm-ascend's groups
        # torch asks for this process's rank in a group by its rank in the world, and vllm-ascend asks torch.
        _world.pg_group_ranks[self.device_group] = {dist.get_rank(): self.rank_in_group}
        if use_device_communicator and self.world_size > 1:
            self.device_communicator = NpuStatelessCommunicator(
                self.ranks,
                global_world_size,
                cpu_group=self.cpu_group,
                device=self.device,
                device_group=self.device_group,
                unique_name=self.unique_name,
                use_all2all=use_all2all,
            )

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Broadcast a tensor from rank ``src`` of the group through host memory.

        Upstream pickles an NPU's tensor, which is unpickled on the sender's NPU.
        """
        if self.world_size == 1 or input_.device.type == "cpu":
            return super().broadcast(input_, src)
        return input_.copy_(self.tcp_store_group.broadcast(input_.cpu(), src))

    def destroy(self) -> None:
        """Destroy the group. May be called again."""
        _world.pg_group_ranks.pop(self.device_group, None)
        super().destroy()
        self.device_communicator = self.device_group = self.cpu_group = None


class _GivenRanks(DeviceCommunicatorBase):
    """Tells vLLM's base the ranks of a stateless group, which vllm-ascend's communicator does not pass on."""

    _given_ranks: list[int]
    _given_world_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, global_ranks=self._given_ranks, global_world_size=self._given_world_size, **kwargs)


class NpuStatelessCommunicator(NPUCommunicator, _GivenRanks):
    """vllm-ascend's communicator for a stateless group."""

    def __init__(self, ranks: list[int], world_size: int, **kwargs: Any) -> None:
        """Take the ranks of the group in the world over all engines, and upstream's arguments."""
        self._given_ranks, self._given_world_size = ranks, world_size
        super().__init__(**kwargs)
        self.all2all_manager = ElasticAll2AllManager()


class ElasticAll2AllManager(_NpuAll2AllManager):
    """vllm-ascend's manager, which does nothing, with the two members that vLLM calls when it scales."""

    def stage_ep_size(self) -> None:
        """Do nothing: MoE communication on NPUs takes its size from the groups."""

    def commit_ep_size(self) -> None:
        """Do nothing, as `stage_ep_size`."""


@contextmanager
def _named(name: str) -> Iterator[None]:
    token = _group_name.set(name)
    try:
        yield
    finally:
        _group_name.reset(token)


def _create_device_group(
    cls: type, backend: str, prefix_store: Any, group_rank: int, group_size: int, timeout: timedelta
) -> ProcessGroup:
    """Return a process group with HCCL as its only backend. Its communicator is created at the first use."""
    options = create_hccl_pg_options(_group_name.get())
    options._timeout = timeout
    options.global_ranks_in_group = []
    if group_rank == 0:  # HCCL's communicators are told apart by a name that is made of this
        prefix_store.set(_GROUP_ID, uuid.uuid4().hex)
    options.group_id = prefix_store.get(_GROUP_ID).decode()
    return NpuAccelerator().create_process_group(prefix_store, group_rank, group_size, options)
