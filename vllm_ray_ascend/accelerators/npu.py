"""Ascend NPUs, through torch_npu, CANN's runtime and vllm-ascend."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.accelerators import npu_errors
from vllm_ray_ascend.accelerators.base import Accelerator, explained
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import physical_of_visible
from vllm_ray_ascend.devices.visible import entries

if TYPE_CHECKING:
    import torch

_ACL = "libascendcl.so"
_PLAIN_FORMATS = (2, 0, 30)  # ACL_FORMAT_ND, NCHW, NCDHW
_BREAKABLE = "vllm.compilation.breakable_cudagraph"


class Npu(Accelerator):
    """The NPUs of this process."""

    kind = NPU
    name = "npu"
    communicator = "hccl"

    @property
    def torch_module(self) -> Any:
        """torch.npu, which torch_npu adds to torch."""
        import torch
        import torch_npu  # noqa: F401

        return torch.npu

    @property
    def graph_class(self) -> Any:
        """ACL graphs; vllm-ascend's UpdatableGraph is a subclass."""
        return self.torch_module.NPUGraph

    def explain(self, error: BaseException | str) -> str | None:
        """By the codes of HCCL and CANN's runtime, and known texts."""
        return explained(error, npu_errors.explain)

    def opened_device(self) -> int:
        """As CANN says: torch.npu.current_device is 0 in a thread that has opened nothing."""
        found = ctypes.c_int32(-1)
        code = ctypes.CDLL(_ACL).aclrtGetDevice(ctypes.byref(found))
        if code:
            raise RuntimeError(
                f"aclrtGetDevice failed with CANN error {code}: worker process {os.getpid()} has no NPU open. Its log "
                "says why, just before this; `npu-smi info` shows whether the NPU is healthy."
            )
        return found.value

    def physical(self, index: int) -> int:
        """As CANN says, or by the visible list where CANN is too old to say."""
        ask = getattr(ctypes.CDLL(_ACL), "aclrtGetLogicDevIdByUserDevId", None)
        found = ctypes.c_int32(-1)
        if ask is not None and ask(ctypes.c_int32(index), ctypes.byref(found)) == 0:
            return found.value
        listed = entries(os.environ.get(NPU.variable))
        return index if listed is None else physical_of_visible([int(entry) for entry in listed], index)

    def current_stream(self) -> Any:
        """As torch.npu says, which makes a new object each time: 80 us on the machine on which all is tested."""
        import torch_npu

        return _stream(torch_npu._C._npu_getCurrentStream(self.current_device()))

    def free_streams(self) -> int | None:
        """As CANN says, 8.5 and later."""
        ask = getattr(ctypes.CDLL(_ACL), "aclrtGetStreamAvailableNum", None)
        found = ctypes.c_uint32()
        return found.value if ask is not None and ask(ctypes.byref(found)) == 0 else None

    def check_transfer(self, work: Any) -> None:
        """An operation whose peer has died counts as completed in torch_npu 2.13, its ``wait()`` raises nothing, and
        the stream that waits for it goes on: HCCL alone knows, and the device."""
        if work.is_success():
            return
        self.synchronise()  # which says what happened
        raise RuntimeError("HCCL says that an operation has failed, and the device does not say why")

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the format that torch knows as well: vllm-ascend keeps some weights in a private one of the NPU."""
        import torch_npu

        if torch_npu.get_npu_format(tensor) not in _PLAIN_FORMATS:
            tensor = torch_npu.npu_format_cast(tensor, _PLAIN_FORMATS[0])
        return tensor.contiguous()

    def leave_groups(self) -> None:
        """vllm-ascend's own groups (MC2, FlashComm, ...), which it has a function to destroy and never calls it."""
        from vllm_ascend.distributed.parallel_state import destroy_ascend_model_parallel

        destroy_ascend_model_parallel()

    def _drop_graphs(self, model_runner: Any) -> None:
        """By what vllm-ascend's sleep mode has for it, in 0.23 to 0.33, and with a new pool of graph memory.

        Each graph is reset as well: else it lives for as long as an error or an output holds on to it.
        A capture that could not begin, for want of a stream, leaves torch_npu's pool as if it went on: every later one
        in that pool fails with "already recording to mempool_id" (seen with torch_npu 2.13).
        """
        from vllm.platforms import current_platform
        from vllm_ascend.compilation import acl_graph
        from vllm_ascend.device_allocator.sleep_mem_optimized import AclGraphSleepWakeupManager

        for graph in _graphs(acl_graph, model_runner):
            graph.reset()
        AclGraphSleepWakeupManager.clear_all_attention_workspaces()
        AclGraphSleepWakeupManager.reset_all_graph_params()
        AclGraphSleepWakeupManager.reset_model_runner_graph_manager(model_runner)
        breakable = getattr(sys.modules.get(_BREAKABLE), "BreakableCUDAGraphWrapper", None)  # since vLLM 0.28
        if breakable is not None:
            breakable.clear_all_graphs()
        encoder: Any = getattr(model_runner, "encoder_cudagraph_manager", None)
        if hasattr(encoder, "clear"):
            encoder.clear()
        type(current_platform)._global_graph_pool = None
        pool = current_platform.get_global_graph_pool()
        manager: Any = getattr(model_runner, "cudagraph_manager", None)
        if getattr(manager, "pool", None) is not None:
            manager.pool = pool
        for wrapper in (*acl_graph._acl_graph_wrappers, *(breakable._all_instances if breakable else ())):
            wrapper.graph_pool = pool

    def _leave_pool(self, pool: Any) -> None:
        """Else that memory is never given back: torch_npu releases the pool only where a capture began and ended."""
        import torch_npu

        device = self.current_device()
        ways = (getattr(torch_npu._C, name, None) for name in ("_npu_endAllocateToPool", "_npu_releasePool"))
        for undo in filter(None, ways):
            with contextlib.suppress(RuntimeError):  # allocation has ended already, where the capture did begin
                undo(device, pool)


@cache
def _stream(found: tuple[int, int, int]) -> Any:
    """torch's object for a stream: its number, its device and the type of that."""
    import torch_npu

    number, index, kind = found
    return torch_npu.npu.Stream(stream_id=number, device_index=index, device_type=kind)


def _graphs(acl_graph: Any, model_runner: Any) -> Iterator[Any]:
    """All that vllm-ascend holds: its wrappers', and those of its second model runner's manager."""
    for wrapper in list(acl_graph._acl_graph_wrappers):
        yield from (entry.aclgraph for entry in wrapper.concrete_aclgraph_entries.values() if entry.aclgraph)
    yield from getattr(getattr(model_runner, "cudagraph_manager", None), "graphs", {}).values()
