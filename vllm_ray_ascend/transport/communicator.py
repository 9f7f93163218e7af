"""Ray's Communicator over HCCL: for any compiled graph whose actors have an NPU each, with or without vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayChannelError
from ray.experimental.channel.accelerator_context import AcceleratorContext
from ray.experimental.channel.communicator import Communicator
from ray.experimental.channel.torch_tensor_type import TorchTensorType
from ray.experimental.util.types import ReduceOp

from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.errors import TensorTransportError, TransferAbortedError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.transport import context
from vllm_ray_ascend.transport.hccl.group import Group, new_root
from vllm_ray_ascend.transport.hccl.transfer import Transfer
from vllm_ray_ascend.transport.meeting import Meeting

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

context.install()


class HcclCommunicator(Communicator):  # type: ignore[misc]
    """A group of actors, each with an NPU, that exchange tensors by HCCL.

    Ray makes one for each graph once `vllm_ray_ascend.transport.register` was called. To choose the actors and their
    order, make one by `over` and pass it to with_tensor_transport or experimental_compile.

    What fails raises HcclError, TransferLateError or TensorTransportError in the actor, which ends the graph with that
    error; RayChannelError, which Ray takes for an orderly end, is raised only once the graph is torn down.
    """

    def __init__(
        self,
        world_size: int,
        comm_id: str,
        rank: int | None,
        actor_handles: Sequence[Any],
        stream: Any = None,
        use_communication_streams: bool = False,
    ) -> None:
        """As Ray calls it in an actor, with ``comm_id`` of `generate_communicator_id`; ``rank`` None connects nothing.

        ``stream`` and ``use_communication_streams`` make no difference: transfers have a stream of their own anyway.
        """
        if len(actor_handles) != world_size:
            raise TensorTransportError(
                f"A communicator of {world_size} ranks needs as many actors, not {len(actor_handles)}. Make it by "
                "HcclCommunicator.over(actors)."
            )
        self._handles = list(actor_handles)
        self._comm_id = comm_id
        self._rank: int | None = None
        self._group: Group | None = None
        self._sent: Transfer | None = None
        self._destroyed = False
        if rank is not None:
            self._connect(rank, bytes.fromhex(comm_id))

    @classmethod
    def over(cls, actors: Sequence[Any]) -> HcclCommunicator:
        """A communicator of these actors, in this order, to pass to one graph or to several in turn."""
        if len({actor._ray_actor_id for actor in actors}) != len(actors):
            raise TensorTransportError("An actor is listed twice. Each rank of a communicator is an actor of its own.")
        ray.get([actor.__ray_call__.remote(_enter) for actor in actors])
        return cls(len(actors), Meeting.new_key(), None, actors)

    def initialize(self, rank: int) -> None:
        """Called by Ray in each actor of a graph that was given this communicator."""
        meeting = Meeting(self._comm_id)
        if rank == 0:
            context.prepare_network()
            root = new_root(context.own_device().index)
            meeting.tell(root)
        else:
            root = meeting.hear()
        try:
            self._connect(rank, root)
        finally:
            if rank == 0:
                meeting.forget()

    def _connect(self, rank: int, root: bytes) -> None:
        own = ray.get_runtime_context().get_actor_id()
        expected = self._handles[rank]._ray_actor_id.hex() if 0 <= rank < len(self._handles) else None
        if own != expected:
            raise TensorTransportError(
                f"Actor {own} is to be rank {rank} of {len(self._handles)}, which is actor {expected}. Make the "
                "communicator by HcclCommunicator.over(actors), and let Ray say the ranks."
            )
        context.prepare_network()
        began = time.monotonic()
        self._rank = rank
        self._group = Group(context.own_device().index, rank, len(self._handles), root)
        logger.info(
            "HCCL communicator: rank %d of %d on %s, connected in %.1f s",
            rank, len(self._handles), context.own_device(), time.monotonic() - began,
        )  # fmt: skip

    def get_actor_handles(self) -> list[Any]:
        """All actors, in the order of their ranks."""
        return self._handles

    def get_rank(self, actor: Any) -> int:
        """Rank of an actor. Raises ValueError where it is none of the group's."""
        ids = [each._ray_actor_id for each in self._handles]
        if actor._ray_actor_id in ids:
            return ids.index(actor._ray_actor_id)
        raise TensorTransportError(f"{actor} is none of the {len(ids)} actors of this communicator.")

    def get_self_rank(self) -> int | None:
        """Rank of this actor; None elsewhere, and before it is connected."""
        return self._rank

    def get_world_size(self) -> int:
        """Number of ranks."""
        return len(self._handles)

    def send(self, value: torch.Tensor, peer_rank: int) -> None:
        """Send after what the calling thread's stream has; returns at once. What is written later comes later."""
        self._sent = self._within(lambda group: group.send(value, peer_rank))

    def when_sent(self) -> Callable[[], None] | None:
        """What waits until the peers have all that was sent so far; None where nothing was."""
        sent = self._sent
        return None if sent is None else lambda: self._within(lambda group: group.wait(sent))

    def recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        peer_rank: int,
        allocator: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Receive into a new tensor, which any stream may read."""

        def make() -> torch.Tensor:
            import torch

            return allocator(shape, dtype) if allocator else torch.empty(shape, dtype=dtype, device=self._device)

        received: torch.Tensor = self._within(lambda group: group.recv_new(make, peer_rank))
        return received

    def allgather(self, send_buf: torch.Tensor, recv_buf: torch.Tensor) -> None:
        """All ranks' ``send_buf`` one after the other into ``recv_buf``, which any stream may then read."""
        self._collective(lambda group: group.all_gather(send_buf, recv_buf))

    def allreduce(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """The ``op`` over all ranks' ``send_buf`` into ``recv_buf``, which any stream may then read."""
        self._collective(lambda group: group.all_reduce(send_buf, recv_buf, op.name.lower()))

    def reducescatter(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """This rank's part of the ``op`` over all ranks' ``send_buf`` into ``recv_buf``, which any stream may read."""
        self._collective(lambda group: group.reduce_scatter(send_buf, recv_buf, op.name.lower()))

    def broadcast(self, buf: torch.Tensor, root_rank: int) -> None:
        """``buf`` of ``root_rank`` into that of all ranks. Not in Ray's interface up to 2.60."""
        self._collective(lambda group: group.broadcast(buf, root_rank))

    @property
    def recv_stream(self) -> Any:
        """A context with a stream to read in: Ray asks for it with _overlap_gpu_communication."""
        return self._contexts[0]

    @property
    def send_stream(self) -> Any:
        """A context with a stream to write in, which waits where the actor's own goes on."""
        return self._contexts[1]

    @property
    def group(self) -> Group:
        """The communicator itself. Raises RayChannelError where it is not connected, or destroyed."""
        if self._group is None:
            raise RayChannelError("This HcclCommunicator is not connected: Ray connects it when a graph is compiled.")
        return self._group

    def abort(self, reason: str) -> None:
        """End all transfers, from any thread, and with them the graph: those that wait raise with ``reason``."""
        if self._group is not None:
            self._group.abort(reason)

    def destroy(self) -> None:
        """End the communicator, from any thread and at any time; peers that wait for this rank get an error."""
        self._destroyed = True
        if self._group is not None:
            self._group.destroy()

    def get_transport_name(self) -> str:
        """As Ray calls transports other than host memory: it accepts no other name."""
        name: str = TorchTensorType.ACCELERATOR
        return name

    @classmethod
    def generate_communicator_id(cls) -> str:
        """The root info of a new communicator, made on this actor's NPU. Ray calls it in the first actor of a group."""
        context.prepare_network()
        return new_root(context.own_device().index).hex()

    def __getstate__(self) -> dict[str, Any]:
        """Travels unconnected: an actor is its rank only once Ray says so."""
        unconnected = {"_rank": None, "_group": None, "_sent": None, "_destroyed": False}
        return {"_handles": self._handles, "_comm_id": self._comm_id} | unconnected

    @cached_property
    def _contexts(self) -> tuple[Any, Any]:
        """The same objects at each call: Ray compares those of several channels."""
        npu = accelerator("npu")
        npu.bind_thread(self.group.device)
        return npu.on_stream(npu.new_stream()), npu.on_stream(npu.new_stream())

    @property
    def _device(self) -> Any:
        return accelerator("npu").device(self.group.device)

    def _collective(self, post: Callable[[Group], Transfer]) -> None:
        self._within(lambda group: post(group).wait())

    def _within(self, work: Callable[[Group], Any]) -> Any:
        try:
            return work(self.group)
        except TransferAbortedError as error:
            if not self._destroyed:
                raise
            raise RayChannelError(str(error)) from error


def _enter(actor: Any) -> None:
    """In an actor: be one whose context is the NPU's."""
    AcceleratorContext.set(context.NpuContext(HcclCommunicator))
