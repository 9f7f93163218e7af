"""Movement of expert weights between ranks: through HCCL, or through gloo and host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator

from vllm_ray_ascend import patches
from vllm_ray_ascend.elastic_ep.admission import GLOO
from vllm_ray_ascend.elastic_ep.groups import NpuStatelessGroup

_TAG = 0


def install() -> None:
    """Let experts move through our communicators where the group is a stateless one."""
    patches.wrap("vllm.distributed.eplb.eplb_state.create_eplb_communicator", _with_stateless_groups)


def _with_stateless_groups(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_communicator(group_coordinator: Any, backend: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(group_coordinator, NpuStatelessGroup):
            return create(group_coordinator, backend, *args, **kwargs)
        kind = GlooExpertCommunicator if backend == GLOO else HcclExpertCommunicator
        return kind(group_coordinator)

    return create_communicator


class ExpertCommunicator(EplbCommunicator):
    """Collects what goes to and comes from each rank, and moves it as one message for each rank and direction.

    torch's own batches of messages look up ranks that stateless groups do not have.
    """

    def __init__(self, group: NpuStatelessGroup) -> None:
        """``group``: ranks are those in it."""
        self._group: ProcessGroup = self._choose_group(group)
        self._sends: dict[int, list[torch.Tensor]] = {}
        self._receives: dict[int, list[torch.Tensor]] = {}
        self._cuda_stream = None

    def add_send(self, tensors: list[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Have ``tensors`` sent to rank ``dst_rank`` by the next `execute`."""
        self._sends.setdefault(dst_rank, []).extend(tensors)

    def add_recv(self, tensors: list[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Have ``tensors`` filled by the next `execute` with what rank ``src_rank`` sends, in its order."""
        self._receives.setdefault(src_rank, []).extend(tensors)

    def execute(self) -> None:
        """Move everything that was added, and forget it. All ranks that are concerned call it."""
        sends, receives = self._sends, self._receives
        self._sends, self._receives = {}, {}
        outgoing = {rank: self._pack(tensors) for rank, tensors in sorted(sends.items())}
        incoming = {rank: self._make_buffer(tensors) for rank, tensors in sorted(receives.items())}
        self._move(outgoing, incoming)
        for rank, buffer in incoming.items():
            unpack(buffer, receives[rank])

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether a profile run has to reserve memory by a collective call: no."""
        return False

    def _choose_group(self, group: NpuStatelessGroup) -> ProcessGroup:
        raise NotImplementedError

    def _pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def _make_buffer(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def _move(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        raise NotImplementedError


class GlooExpertCommunicator(ExpertCommunicator):
    """Moves experts through host memory and gloo: no second HCCL communicator."""

    def _choose_group(self, group: NpuStatelessGroup) -> ProcessGroup:
        return group.cpu_group

    def _pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return pack(tensors).cpu()

    def _make_buffer(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.empty(total_bytes(tensors), dtype=torch.uint8)

    def _move(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        pending: list[Work] = [self._group.recv([buffer], rank, _TAG) for rank, buffer in incoming.items()]
        pending += [self._group.send([buffer], rank, _TAG) for rank, buffer in outgoing.items()]
        for work in pending:
            work.wait()


class HcclExpertCommunicator(ExpertCommunicator):
    """Moves experts from NPU to NPU, in one HCCL batch."""

    def _choose_group(self, group: NpuStatelessGroup) -> ProcessGroup:
        return group.device_group

    def _pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return pack(tensors)

    def _make_buffer(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.empty(total_bytes(tensors), dtype=torch.uint8, device=tensors[0].device)

    def _move(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        operations = [("isend", buffer, rank) for rank, buffer in outgoing.items()]
        operations += [("irecv", buffer, rank) for rank, buffer in incoming.items()]
        if operations:
            kinds, buffers, ranks = map(list, zip(*operations, strict=True))
            self._group._get_backend(buffers[0].device).batch_isend_irecv(kinds, buffers, ranks).wait()


def total_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return how many bytes ``tensors`` have together."""
    return sum(tensor.nbytes for tensor in tensors)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of ``tensors`` one after the other, on their device."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Fill ``tensors`` from the bytes that `pack` made of such tensors."""
    start = 0
    for tensor in tensors:
        part = buffer[start : start + tensor.nbytes].to(tensor.device)
        tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
        start += tensor.nbytes
