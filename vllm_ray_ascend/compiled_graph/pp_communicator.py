"""Tensors between the stages of vLLM's pipeline in a Ray compiled graph, over the group that vLLM has anyway."""

from __future__ import annotations

import collections
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayChannelError
from ray.experimental.channel.communicator import Communicator

from vllm_ray_ascend.accelerators.choose import current_accelerator

if TYPE_CHECKING:
    import torch

_SPIN_S = 50e-6
"""Seconds for which a wait polls without a pause."""
_MAX_PAUSE_S = 1e-3


class HcclPPCommunicator(Communicator):  # type: ignore[misc]  # Ray has no types
    """Ray's Communicator over vLLM's pipeline group of this process, on NPUs (HCCL) and on GPUs (NCCL) alike.

    It creates no communicator of its own: a pair's is connected when the engine starts
    (executor/pipeline_warmup.py), and HCCL's streams and buffers are scarce. Pass it to `with_tensor_transport`, one
    for each pipeline group, its actors in the order of their stages; or register it with Ray, which then creates it in
    each actor. One thread sends and receives; any thread may call `destroy`.
    """

    def __init__(
        self,
        world_size: int,
        comm_id: Any,
        rank: int | None,
        actor_handles: Sequence[Any],
        stream: Any = None,
        use_communication_streams: bool = False,
        limit_s: float | None = None,
    ) -> None:
        """Take Ray's arguments. ``rank`` is None in a process that is no member, such as the driver.

        ``limit_s``: seconds for which a receive waits for its tensor; None: until `destroy`.
        """
        if use_communication_streams:
            raise NotImplementedError(
                "VRA-456: HcclPPCommunicator uses the stream of its stage: overlapping communication is not supported. "
                "Compile the graph without _overlap_gpu_communication, and unset RAY_CGRAPH_overlap_gpu_communication."
            )
        if stream is not None and stream != current_accelerator().current_stream():
            raise ValueError("VRA-457: HcclPPCommunicator uses the stream of its stage, and accepts no other one.")
        self._world_size = world_size
        self._actors = list(actor_handles)
        self._limit_s = limit_s
        self._member: _GroupMember | None = None
        if rank is not None:
            self.join_group(_own_actor_id())

    def initialize(self, rank: int) -> None:
        """Join, in the actor that is the group's ``rank``. All members do so simultaneously.

        Raises ValueError where vLLM's group has another order.
        """
        member = self.join_group(_own_actor_id())
        actor_ids = [actor._actor_id.hex() for actor in self._actors]
        if member.actor_ids != actor_ids or member.stage != rank:
            raise ValueError(
                f"VRA-458: vLLM's pipeline group has the actors {member.actor_ids}, with this one at {member.stage}; "
                f"the graph has {actor_ids}, with this one at {rank}. Give the actors in the order of their stages."
            )

    def join_group(self, actor_id: str) -> _GroupMember:
        """Exchange actor ids with the other members, on the CPU; ``actor_id`` is this process's."""
        self._member = _GroupMember(actor_id)
        return self._member

    def get_actor_handles(self) -> list[Any]:
        """Return the actors, by stage."""
        return self._actors

    def get_rank(self, actor: Any) -> int:
        """Return the stage of ``actor``. Raises ValueError where it has none."""
        actor_id = actor._actor_id.hex()
        actor_ids = self._member.actor_ids if self._member else [each._actor_id.hex() for each in self._actors]
        if actor_id not in actor_ids:
            raise ValueError(f"VRA-459: actor {actor_id} is not in this pipeline group: {actor_ids}")
        return actor_ids.index(actor_id)

    def get_self_rank(self) -> int | None:
        """Return the stage of this process; None in one that is no member."""
        return self._member.stage if self._member else None

    def get_world_size(self) -> int:
        """Return how many stages there are."""
        return self._world_size

    def get_transport_name(self) -> str:
        """Return the one name that Ray 2.48 to 2.60 accepts for a communicator between devices."""
        return "accelerator"

    @classmethod
    def generate_communicator_id(cls) -> str:
        """Return a random id: Ray requires one, and nothing uses it."""
        return uuid.uuid4().hex

    def send(self, buf: torch.Tensor, peer_rank: int) -> None:
        """Queue a tensor for a stage, after what the current stream has queued so far.

        Later work of that stream waits until the tensor is sent, so that it may write to the same memory. Raises
        RayChannelError after `destroy`.
        """
        if buf.numel():
            self._require_member().send(buf, peer_rank)

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype, peer_rank: int, allocator: Any = None) -> torch.Tensor:
        """Return a tensor of a stage, which may be read on any stream.

        Raises RayChannelError after `destroy`, and where the tensor does not arrive in time: vLLM's group still waits
        for it then, and cannot be used any more.
        """
        import torch

        member = self._require_member()
        buffer = torch.empty(tuple(shape), dtype=dtype, device=member.device)
        if buffer.numel():
            member.receive(buffer, peer_rank, self._limit_s)
        return buffer

    @property
    def recv_stream(self) -> AbstractContextManager[Any]:
        """A context with the thread's stream, to which a receive goes."""
        return current_accelerator().stream_context(current_accelerator().current_stream())

    @property
    def send_stream(self) -> AbstractContextManager[Any]:
        """A context with the thread's stream, to which a send goes."""
        return current_accelerator().stream_context(current_accelerator().current_stream())

    def set_failure_callback(self, callback: Callable[[Exception], None]) -> None:
        """Call ``callback`` with the error of a failed transfer: Ray's loop treats it as a closed channel, and ends
        without a report."""
        self._require_member().failure_callback = callback

    def describe_transfer(self) -> str:
        """Return the transfer in progress, in words; empty where there is none."""
        return self._member.current_transfer if self._member else ""

    def when_sent(self) -> Callable[[], None] | None:
        """Return a function that waits until the next stages have all that was sent so far; None where nothing waits.

        The function raises RayChannelError as `recv` does.
        """
        return self._require_member().when_sent(self._limit_s)

    def drain(self, limit_s: float) -> bool:
        """Wait, after `destroy`, for the call in progress and for all sends; return whether they ended in time."""
        return self._member is None or self._member.drain(limit_s)

    def destroy(self) -> None:
        """End a receive in progress, and reject all later calls. vLLM's group stays: it is not ours."""
        if self._member is not None:
            self._member.closed.set()

    def allgather(self, send_buf: torch.Tensor, recv_buf: torch.Tensor) -> None:
        """Raise NotImplementedError."""
        raise _no_collectives_error()

    def allreduce(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: Any = None) -> None:
        """Raise NotImplementedError."""
        raise _no_collectives_error()

    def reducescatter(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: Any = None) -> None:
        """Raise NotImplementedError."""
        raise _no_collectives_error()

    def _require_member(self) -> _GroupMember:
        if self._member is None:
            raise RayChannelError("VRA-461: this process is no member of the pipeline group")
        if self._member.closed.is_set():
            raise _destroyed_error()
        return self._member


class _GroupMember:
    """This process as a member: vLLM's group, the actors behind its ranks, and the transfers in progress."""

    def __init__(self, actor_id: str) -> None:
        from torch import distributed
        from vllm.distributed.parallel_state import get_pp_group

        group = get_pp_group()
        self.stage: int = group.rank_in_group
        self.device = current_accelerator().torch_device(current_accelerator().current_device())
        self.closed = threading.Event()
        self.failure_callback: Callable[[Exception], None] = lambda _: None
        self.current_transfer = ""
        self._ranks: list[int] = group.ranks
        self._group = group.device_group
        self._transfer_lock = threading.Lock()
        self._sends: collections.deque[tuple[Any, torch.Tensor, int]] = collections.deque()
        """Sends in progress, in order: torch's work, the tensor that has to live, and the stage."""
        self.actor_ids = [actor_id] * group.world_size
        if group.world_size > 1:
            distributed.all_gather_object(self.actor_ids, actor_id, group=group.cpu_group)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        from torch import distributed

        with self._track_transfer(f"sending to stage {peer}"):
            self._remove_completed_sends()
            tensor = tensor.contiguous()
            work = distributed.isend(tensor, self._ranks[peer], group=self._group)
            if work is None:
                raise self._not_in_group_error(peer)
            work.wait()  # the stream waits, and not this thread
            self._sends.append((work, tensor, peer))

    def when_sent(self, limit_s: float | None) -> Callable[[], None] | None:
        if not self._sends:
            return None
        work, _, peer = self._sends[-1]

        def wait_until_sent() -> None:
            with self._track_transfer(f"waiting until stage {peer} has a tensor"):
                self._wait_for_work(work, f"until stage {peer} receives a tensor that was sent to it", limit_s)

        return wait_until_sent

    def receive(self, buffer: torch.Tensor, peer: int, limit_s: float | None) -> None:
        from torch import distributed

        with self._track_transfer(f"waiting for a tensor of stage {peer}"):
            work = distributed.irecv(buffer, self._ranks[peer], group=self._group)
            if work is None:
                raise self._not_in_group_error(peer)
            stopped: RuntimeError | None = None
            try:
                self._wait_for_work(work, f"for a tensor that stage {peer} was to send", limit_s)
                work.wait()
            except RuntimeError as error:  # torch_npu's: an error has stopped the device's context
                stopped = error
            if stopped or not work.is_success():  # completed, as torch says, is also what failed
                raise RuntimeError(
                    f"VRA-373: the tensor of stage {peer} did not arrive: the communicator has failed"
                ) from stopped

    def drain(self, limit_s: float) -> bool:
        """Wait until no call is in progress and nothing is being sent; return whether that took at most ``limit_s``."""
        deadline = time.monotonic() + limit_s
        if not self._transfer_lock.acquire(timeout=limit_s):
            return False
        try:
            while self._sends and time.monotonic() < deadline:
                self._remove_completed_sends()
                time.sleep(_MAX_PAUSE_S)
        finally:
            self._transfer_lock.release()
        return not self._sends

    @contextmanager
    def _track_transfer(self, what: str) -> Iterator[None]:
        """Allow one transfer at a time, and none while a graph is captured. An error is reported and closes the
        channel."""
        with self._transfer_lock, current_accelerator().exclude_captures("a transfer between pipeline stages"):
            self.current_transfer = what
            try:
                yield
            except RayChannelError:
                raise
            except Exception as error:  # whatever it is, Ray ends its loop by RayChannelError alone
                self.failure_callback(error)
                raise RayChannelError(f"VRA-464: {what} failed: {error}") from error
            finally:
                self.current_transfer = ""

    def _wait_for_work(self, work: Any, what: str, limit_s: float | None) -> None:
        """Wait for torch's ``work``, with pauses that grow with the time waited."""
        started = time.monotonic()
        while not work.is_completed():
            if self.closed.is_set():
                raise _destroyed_error()
            waited = time.monotonic() - started
            if limit_s is not None and waited > limit_s:
                raise TimeoutError(
                    f"VRA-465: stage {self.stage} has waited {limit_s:g} s {what}. The log of that stage's rank shows "
                    "what it is doing. If it only needs longer, raise VLLM_RAY_ASCEND_HANG_S."
                )
            time.sleep(0 if waited < _SPIN_S else min(waited / 8, _MAX_PAUSE_S))

    def _remove_completed_sends(self) -> None:
        """Release tensors that have arrived."""
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()

    def _not_in_group_error(self, peer: int) -> RayChannelError:
        return RayChannelError(f"VRA-463: stage {self.stage} is not in the group of stage {peer}")


def _no_collectives_error() -> NotImplementedError:
    return NotImplementedError(
        "VRA-460: HcclPPCommunicator only sends and receives between stages; use HcclCommunicator for collectives."
    )


def _destroyed_error() -> RayChannelError:
    return RayChannelError("VRA-462: the pipeline's communicator was destroyed")


def _own_actor_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_actor_id())
