"""Ascend NPUs, through torch_npu, CANN's runtime and vllm-ascend."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.accelerators import npu_errors
from vllm_ray_ascend.accelerators.base import Accelerator, explain_with_causes
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.numbering import visible_to_physical
from vllm_ray_ascend.devices.visible import split_entries
from vllm_ray_ascend.log import get_logger

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

logger = get_logger(__name__)

_ACL_LIBRARY = "libascendcl.so"
_NO_CONTEXT = 107002
_PLAIN_FORMATS = (2, 0, 30)  # ACL_FORMAT_ND, NCHW, NCDHW
_BREAKABLE_MODULE = "vllm.compilation.breakable_cudagraph"
_POOL_FUNCTIONS = (("_npu_endAllocateToPool", "_npu_endAllocateCurrentStreamToPool"), ("_npu_releasePool",))
"""torch_npu._C's functions that end allocation from a pool and release it, called in this order. The first name of a
group is that of torch_npu 2.13 and 2.14, the second that of 2.10 to 2.12."""


class NpuAccelerator(Accelerator):
    """The NPUs of this process."""

    kind = NPU
    name = "npu"
    dist_backend = "hccl"
    graph_target = "torch_npu.npu.graphs.NPUGraph"

    @property
    def torch_module(self) -> Any:
        """torch.npu, which torch_npu adds to torch."""
        import torch
        import torch_npu  # noqa: F401

        return torch.npu

    @property
    def graph_class(self) -> Any:
        """torch_npu's ACL graphs; vllm-ascend's UpdatableGraph is a subclass."""
        return self.torch_module.NPUGraph

    def explain_error(self, error: BaseException | str) -> str | None:
        """Explain by the codes of HCCL and CANN's runtime, and by known texts."""
        return explain_with_causes(error, npu_errors.explain_text)

    def get_opened_device(self) -> int:
        """Return CANN's device of this thread.

        Its context is asked for first: torch.npu.current_device is 0 in a thread that has opened nothing, and so is
        CANN's aclrtGetDevice since 8.3, where torch_npu sets a default device (its acl_default.json).
        """
        library = ctypes.CDLL(_ACL_LIBRARY)
        context, found = ctypes.c_void_p(), ctypes.c_int32(-1)
        code = library.aclrtGetCurrentContext(ctypes.byref(context)) or (0 if context.value else _NO_CONTEXT)
        code = code or library.aclrtGetDevice(ctypes.byref(found))
        if code:
            raise RuntimeError(
                f"VRA-410: CANN error {code}: worker process {os.getpid()} has no NPU open. "
                "The reason is in its log, just before this; `npu-smi info` shows whether the NPU is healthy."
            )
        return found.value

    def physical_device_id(self, index: int) -> int:
        """Return CANN's physical number, or where CANN is too old to report it, that of the visible list."""
        get_user_device = getattr(ctypes.CDLL(_ACL_LIBRARY), "aclrtGetLogicDevIdByUserDevId", None)
        found = ctypes.c_int32(-1)
        if get_user_device is not None and get_user_device(ctypes.c_int32(index), ctypes.byref(found)) == 0:
            return found.value
        listed = split_entries(os.environ.get(NPU.variable))
        return index if listed is None else visible_to_physical([int(entry) for entry in listed], index)

    def current_stream(self) -> Any:
        """Return what torch.npu.current_stream does, without making a new object each time, which takes 80 us."""
        import torch_npu

        return _wrap_stream(torch_npu._C._npu_getCurrentStream(self.current_device()))

    def count_free_streams(self) -> int | None:
        """Return CANN's count, which CANN 8.5 and later have."""
        get_available = getattr(ctypes.CDLL(_ACL_LIBRARY), "aclrtGetStreamAvailableNum", None)
        found = ctypes.c_uint32()
        return found.value if get_available is not None and get_available(ctypes.byref(found)) == 0 else None

    def to_plain_format(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a format that torch knows as well: vllm-ascend keeps some weights in a private one."""
        import torch_npu

        if torch_npu.get_npu_format(tensor) not in _PLAIN_FORMATS:
            tensor = torch_npu.npu_format_cast(tensor, _PLAIN_FORMATS[0])
        return tensor.contiguous()

    def destroy_platform_groups(self) -> None:
        """Destroy vllm-ascend's own groups (MC2, FlashComm, ...): it has a function for that, and never calls it."""
        from vllm_ascend.distributed.parallel_state import destroy_ascend_model_parallel

        destroy_ascend_model_parallel()

    def create_process_group(self, store: Any, rank: int, size: int, options: Any) -> ProcessGroup:
        """Return a process group with HCCL as its only backend, independent of torch's world.

        ``options`` are ProcessGroupHCCL's. HCCL's communicator is created at the first use.
        """
        import torch
        import torch_npu
        from torch.distributed import ProcessGroup

        backend = torch_npu._C._distributed_c10d.ProcessGroupHCCL(store, rank, size, options)
        backend._set_sequence_number_for_group()
        group = ProcessGroup(store, rank, size)
        group._set_default_backend(ProcessGroup.BackendType.CUSTOM)
        group._register_backend(torch.device(self.name), ProcessGroup.BackendType.CUSTOM, backend)
        return group

    def _clear_graphs(self, model_runner: Any) -> None:
        """Clear graphs as vllm-ascend's sleep mode does, in 0.23 to 0.33, and set a new pool of graph memory.

        Each graph is reset as well: else it lives for as long as an error or an output refers to it.
        A capture that could not begin, because streams ran out, leaves torch_npu's pool in the state of a capture in
        progress: every later one in that pool fails with "already recording to mempool_id" (seen with torch_npu 2.13).
        """
        from vllm.platforms import current_platform
        from vllm_ascend.compilation import acl_graph
        from vllm_ascend.device_allocator.sleep_mem_optimized import AclGraphSleepWakeupManager

        for graph in _iterate_graphs(acl_graph, model_runner):
            graph.reset()
        AclGraphSleepWakeupManager.clear_all_attention_workspaces()
        AclGraphSleepWakeupManager.reset_all_graph_params()
        AclGraphSleepWakeupManager.reset_model_runner_graph_manager(model_runner)
        breakable = getattr(sys.modules.get(_BREAKABLE_MODULE), "BreakableCUDAGraphWrapper", None)  # since vLLM 0.28
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

    def _release_capture_pool(self, pool: Any) -> None:
        """Release the pool: torch_npu does so only where a capture began and ended, else its memory is never freed.

        torch_npu 2.10 does not even end allocation where the end of a capture fails: no later capture can begin then.
        """
        import torch_npu

        device = self.current_device()
        for function in find_pool_functions(torch_npu._C):
            with contextlib.suppress(RuntimeError):  # allocation has ended already, where the capture did begin
                function(device, pool)


def find_pool_functions(bindings: Any) -> Sequence[Callable[[int, Any], None]]:
    """Return the functions of _POOL_FUNCTIONS that torch_npu's ``bindings`` have. One that is gone is reported once."""
    found = []
    for names in _POOL_FUNCTIONS:
        function = next((getattr(bindings, name) for name in names if hasattr(bindings, name)), None)
        if function is None:
            _report_missing(names)
        else:
            found.append(function)
    return found


@cache
def _report_missing(names: tuple[str, ...]) -> None:
    logger.warning(
        "VRA-190: torch_npu._C no longer has %s, which releases the memory of a failed capture: further captures may "
        "fail as well. Install a torch_npu from 2.10 to 2.14 or a newer vllm-ray-ascend, or start with "
        "--enforce-eager.",
        " or ".join(names),
    )


@cache
def _wrap_stream(found: tuple[int, int, int]) -> Any:
    """Return torch's object for a stream, given as its id, its device's index and its device's type."""
    import torch_npu

    number, index, kind = found
    return torch_npu.npu.Stream(stream_id=number, device_index=index, device_type=kind)


def _iterate_graphs(acl_graph: Any, model_runner: Any) -> Iterator[Any]:
    """Yield all graphs that vllm-ascend holds: its wrappers', and those of its second model runner's manager."""
    for wrapper in list(acl_graph._acl_graph_wrappers):
        yield from (entry.aclgraph for entry in wrapper.concrete_aclgraph_entries.values() if entry.aclgraph)
    yield from getattr(getattr(model_runner, "cudagraph_manager", None), "graphs", {}).values()
