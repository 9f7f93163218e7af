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

from vllm_ray_ascend.accelerators.choose import current

if TYPE_CHECKING:
    import torch

_SPIN_S = 50e-6
_LONGEST_NAP_S = 1e-3
_COLLECTIVES = "HcclPPCommunicator only sends and receives between stages; use HcclCommunicator for collectives."


class HcclPPCommunicator(Communicator):  # type: ignore[misc]  # Ray tells no types
    """Ray's Communicator over vLLM's pipeline group of this process, on NPUs (HCCL) and on GPUs (NCCL) alike.

    It makes no communicator of its own: a pair's is connected when the engine starts (executor/pairs.py), and HCCL's
    streams and buffers are scarce. Pass it to `with_tensor_transport`, one for each pipeline group, its actors in the
    order of their stages; or register it with Ray, which then makes it in each actor. One thread sends and receives;
    any thread may call `destroy`.
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
        """As Ray calls it. ``rank`` is None in a process that is no member, such as the driver. ``limit_s``: seconds
        for which a receive waits for its tensor; None: until `destroy`."""
        if use_communication_streams:
            raise NotImplementedError(
                "HcclPPCommunicator uses the stream of its stage: overlapping communication is not supported. Compile "
                "the graph without _overlap_gpu_communication, and unset RAY_CGRAPH_overlap_gpu_communication."
            )
        if stream is not None and stream != current().current_stream():
            raise ValueError("HcclPPCommunicator uses the stream of its stage, and takes no other one.")
        self._world_size = world_size
        self._actors = list(actor_handles)
        self._limit_s = limit_s
        self._members: _Members | None = None
        if rank is not None:
            self.join(_own_actor())

    def initialize(self, rank: int) -> None:
        """Join, in the actor that is the group's ``rank``. All members do so at once. ValueError where vLLM has
        another order."""
        members = self.join(_own_actor())
        here = [actor._actor_id.hex() for actor in self._actors]
        if members.actors != here or members.own != rank:
            raise ValueError(
                f"vLLM's pipeline group has the actors {members.actors}, with this one at {members.own}; the graph has "
                f"{here}, with this one at {rank}. Give the actors in the order of their stages."
            )

    def join(self, actor: str) -> _Members:
        """Learn the other members' actors, by way of the group's CPUs; ``actor`` is the id of this process's."""
        self._members = _Members(actor)
        return self._members

    def get_actor_handles(self) -> list[Any]:
        """The actors, by stage."""
        return self._actors

    def get_rank(self, actor: Any) -> int:
        """The stage of ``actor``. ValueError where it has none."""
        name = actor._actor_id.hex()
        names = self._members.actors if self._members else [each._actor_id.hex() for each in self._actors]
        if name not in names:
            raise ValueError(f"actor {name} is not in this pipeline group: {names}")
        return names.index(name)

    def get_self_rank(self) -> int | None:
        """The stage of this process; None in one that is no member."""
        return self._members.own if self._members else None

    def get_world_size(self) -> int:
        """How many stages there are."""
        return self._world_size

    def get_transport_name(self) -> str:
        """Ray 2.48 to 2.60 takes no other name of a communicator that moves tensors between devices."""
        return "accelerator"

    @classmethod
    def generate_communicator_id(cls) -> str:
        """Ray asks for one; nothing needs it."""
        return uuid.uuid4().hex

    def send(self, buf: torch.Tensor, peer_rank: int) -> None:
        """Queue a tensor for a stage, after what the current stream has queued so far; later work of that stream waits
        until it is sent, so that it may write to the same memory. RayChannelError after `destroy`."""
        if buf.numel():
            self._member().send(buf, peer_rank)

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype, peer_rank: int, allocator: Any = None) -> torch.Tensor:
        """A tensor from a stage, safe to be read on any stream. RayChannelError after `destroy`, and where it does not
        come in time: vLLM's group still waits for it then, and is of no more use."""
        import torch

        members = self._member()
        buffer = torch.empty(tuple(shape), dtype=dtype, device=members.device)
        if buffer.numel():
            members.receive(buffer, peer_rank, self._limit_s)
        return buffer

    @property
    def recv_stream(self) -> AbstractContextManager[Any]:
        """Work of a receive goes to the thread's stream."""
        return current().on_stream(current().current_stream())

    @property
    def send_stream(self) -> AbstractContextManager[Any]:
        """Work of a send goes to the thread's stream."""
        return current().on_stream(current().current_stream())

    def on_failure(self, tell: Callable[[Exception], None]) -> None:
        """Have ``tell`` called with what goes wrong in a transfer: Ray's loop takes it for a channel that was closed,
        and ends without a word."""
        self._member().tell = tell

    def doing(self) -> str:
        """The transfer that is under way, in words; empty where there is none."""
        return self._members.doing if self._members else ""

    def when_sent(self) -> Callable[[], None] | None:
        """What waits until the next stages have all that was sent so far, and raises RayChannelError as `recv` does;
        None where nothing is on its way."""
        return self._member().when_sent(self._limit_s)

    def settle(self, limit_s: float) -> bool:
        """After `destroy`: wait until no call is under way and all that was sent has gone; whether that came."""
        return self._members is None or self._members.settle(limit_s)

    def destroy(self) -> None:
        """End a receive that is under way, and refuse all later calls. vLLM's group stays: it is not ours."""
        if self._members is not None:
            self._members.closed.set()

    def allgather(self, send_buf: torch.Tensor, recv_buf: torch.Tensor) -> None:
        """Not supported."""
        raise NotImplementedError(_COLLECTIVES)

    def allreduce(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: Any = None) -> None:
        """Not supported."""
        raise NotImplementedError(_COLLECTIVES)

    def reducescatter(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: Any = None) -> None:
        """Not supported."""
        raise NotImplementedError(_COLLECTIVES)

    def _member(self) -> _Members:
        if self._members is None:
            raise RayChannelError("this process is no member of the pipeline group")
        if self._members.closed.is_set():
            raise RayChannelError("the pipeline's communicator was destroyed")
        return self._members


class _Members:
    """A member's end: vLLM's group, the actors behind its ranks, and what is under way."""

    def __init__(self, actor: str) -> None:
        from torch import distributed
        from vllm.distributed.parallel_state import get_pp_group

        group = get_pp_group()
        self.own: int = group.rank_in_group
        self.device = current().device(current().current_device())
        self.closed = threading.Event()
        self.tell: Callable[[Exception], None] = lambda _: None
        self.doing = ""
        self._ranks: list[int] = group.ranks
        self._group = group.device_group
        self._turn = threading.Lock()
        self._sending: collections.deque[tuple[Any, torch.Tensor, int]] = collections.deque()
        self.actors = [actor] * group.world_size
        if group.world_size > 1:
            distributed.all_gather_object(self.actors, actor, group=group.cpu_group)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        from torch import distributed

        with self._call(f"sending to stage {peer}"):
            self._forget_sent()
            tensor = tensor.contiguous()
            work = distributed.isend(tensor, self._ranks[peer], group=self._group)
            if work is None:
                raise RayChannelError(f"stage {self.own} is not in the group of stage {peer}")
            work.wait()  # the stream does, and not this thread
            self._sending.append((work, tensor, peer))

    def when_sent(self, limit_s: float | None) -> Callable[[], None] | None:
        if not self._sending:
            return None
        work, _, peer = self._sending[-1]

        def wait() -> None:
            with self._call(f"waiting until stage {peer} has a tensor"):
                self._await(work, f"until stage {peer} takes a tensor that was sent to it", limit_s)

        return wait

    def receive(self, buffer: torch.Tensor, peer: int, limit_s: float | None) -> None:
        from torch import distributed

        with self._call(f"waiting for a tensor of stage {peer}"):
            work = distributed.irecv(buffer, self._ranks[peer], group=self._group)
            if work is None:
                raise RayChannelError(f"stage {self.own} is not in the group of stage {peer}")
            self._await(work, f"for a tensor that stage {peer} was to send", limit_s)
            work.wait()
            current().check_transfer(work)

    def settle(self, limit_s: float) -> bool:
        """Wait until no call is under way and nothing is being sent."""
        deadline = time.monotonic() + limit_s
        if not self._turn.acquire(timeout=limit_s):
            return False
        try:
            while self._sending and time.monotonic() < deadline:
                self._forget_sent()
                time.sleep(_LONGEST_NAP_S)
        finally:
            self._turn.release()
        return not self._sending

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        """One transfer at a time, not while a graph is captured; what goes wrong is told and closes the channel."""
        with self._turn, current().guard("a transfer between pipeline stages"):
            self.doing = what
            try:
                yield
            except RayChannelError:
                raise
            except Exception as error:
                self.tell(error)
                raise RayChannelError(f"{what} failed: {error}") from error
            finally:
                self.doing = ""

    def _await(self, work: Any, what: str, limit_s: float | None) -> None:
        """Wait for ``work``, napping for longer the longer it takes."""
        started = time.monotonic()
        while not work.is_completed():
            if self.closed.is_set():
                raise RayChannelError("the pipeline's communicator was destroyed")
            waited = time.monotonic() - started
            if limit_s is not None and waited > limit_s:
                raise TimeoutError(
                    f"stage {self.own} has waited {limit_s:g} s {what}. The log of that stage's rank says what it "
                    "does. If it only needs longer, raise VLLM_RAY_ASCEND_HANG_S."
                )
            time.sleep(0 if waited < _SPIN_S else min(waited / 8, _LONGEST_NAP_S))

    def _forget_sent(self) -> None:
        """Let go of tensors that have arrived."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()


def _own_actor() -> str:
    import ray

    return str(ray.get_runtime_context().get_actor_id())
