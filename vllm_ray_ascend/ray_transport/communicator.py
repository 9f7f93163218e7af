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

from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.errors import TensorTransportError, TransferAbortedError
from vllm_ray_ascend.hccl.communicator import OPERATIONS, Group, Transfer, create_root_info
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.ray_transport import accelerator_context
from vllm_ray_ascend.ray_transport.rendezvous import RootInfoStore

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

accelerator_context.install()


_OPERATIONS = tuple(each for each in OPERATIONS if each != "exchange")
"""What Ray's interface has."""


class HcclCommunicator(Communicator):  # type: ignore[misc]
    """A group of actors, each with an NPU, that exchange tensors by HCCL.

    Ray creates one for each graph once `vllm_ray_ascend.ray_transport.register` was called. To choose the actors and
    their order, create one by `from_actors` and pass it to with_tensor_transport or experimental_compile.

    A failure raises HcclError, TransferLateError or TensorTransportError in the actor, which ends the graph with that
    error; RayChannelError, which means an orderly end to Ray, is raised only once the graph is torn down.
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
        """Create a rank, as Ray does in an actor, with ``comm_id`` of `generate_communicator_id`.

        With ``rank`` None it does not connect. ``stream`` and ``use_communication_streams`` make no difference:
        transfers have a stream of their own in any case.
        """
        if len(actor_handles) != world_size:
            raise TensorTransportError(
                "VRA-520",
                f"A communicator of {world_size} ranks needs as many actors, not {len(actor_handles)}. Create it by "
                "HcclCommunicator.from_actors(actors).",
            )
        self._handles = list(actor_handles)
        self._comm_id = comm_id
        self._rank: int | None = None
        self._group: Group | None = None
        self._last_send: Transfer | None = None
        self._destroyed = False
        if rank is not None:
            self._connect(rank, bytes.fromhex(comm_id))

    @classmethod
    def from_actors(cls, actors: Sequence[Any]) -> HcclCommunicator:
        """Return a communicator of these actors, in this order, to pass to one graph or to several in turn."""
        if len({actor._ray_actor_id for actor in actors}) != len(actors):
            raise TensorTransportError(
                "VRA-521", "An actor is listed twice. Each rank of a communicator is an actor of its own."
            )
        ray.get([actor.__ray_call__.remote(_set_npu_context) for actor in actors])
        return cls(len(actors), RootInfoStore.create_key(), None, actors)

    def initialize(self, rank: int) -> None:
        """Connect, in each actor of a graph that was given this communicator. Called by Ray."""
        store = RootInfoStore(self._comm_id)
        if rank == 0:
            accelerator_context.prepare_network()
            root_info = _create_root_info()
            store.publish(root_info)
        else:
            root_info = store.wait()
        try:
            self._connect(rank, root_info)
        finally:
            if rank == 0:
                store.delete()

    def _connect(self, rank: int, root_info: bytes) -> None:
        own = ray.get_runtime_context().get_actor_id()
        expected = self._handles[rank]._ray_actor_id.hex() if 0 <= rank < len(self._handles) else None
        if own != expected:
            raise TensorTransportError(
                "VRA-522",
                f"Actor {own} is to be rank {rank} of {len(self._handles)}, which is actor {expected}. Create the "
                "communicator by HcclCommunicator.from_actors(actors), and let Ray set the ranks.",
            )
        accelerator_context.prepare_network()
        started_at = time.monotonic()
        self._rank = rank
        self._group = Group(accelerator_context.get_actor_device().index, rank, len(self._handles), root_info)
        if self._destroyed:  # while it met the others
            self._group.destroy()
        self._group.connect(_OPERATIONS)
        logger.info(
            "HCCL communicator: rank %d of %d on %s, connected in %.1f s",
            rank, len(self._handles), accelerator_context.get_actor_device(), time.monotonic() - started_at,
        )  # fmt: skip

    def get_actor_handles(self) -> list[Any]:
        """Return all actors, in the order of their ranks."""
        return self._handles

    def get_rank(self, actor: Any) -> int:
        """Return the rank of an actor. Raises TensorTransportError, a ValueError, for an actor of another group."""
        ids = [each._ray_actor_id for each in self._handles]
        if actor._ray_actor_id in ids:
            return ids.index(actor._ray_actor_id)
        raise TensorTransportError("VRA-523", f"{actor} is none of the {len(ids)} actors of this communicator.")

    def get_self_rank(self) -> int | None:
        """Return the rank of this actor; None in other processes, and before it is connected."""
        return self._rank

    def get_world_size(self) -> int:
        """Return the number of ranks."""
        return len(self._handles)

    def send(self, value: torch.Tensor, peer_rank: int) -> None:
        """Send a copy, made after what the caller's stream has queued; returns immediately.

        That stream may overwrite the tensor, and never waits for a peer. HCCL sends only once the receiver is there: of
        two actors that send to each other, neither could compute what it has to before it receives.
        """
        transfer = self._call_group(lambda group: group.send(value, peer_rank, caller_waits=False, copy=True))
        if value.numel():  # else nothing is sent, and what was sent before may not have arrived
            self._last_send = transfer

    def when_sent(self) -> Callable[[], None] | None:
        """Return a function that waits until the peers have all that was sent up to now; None where nothing was."""
        last_send = self._last_send
        return None if last_send is None else lambda: self._call_group(lambda group: group.wait_for(last_send))

    def recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        peer_rank: int,
        allocator: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Receive into a new tensor, which any stream may read, and wait for it."""

        def allocate() -> torch.Tensor:
            import torch

            return allocator(shape, dtype) if allocator else torch.empty(shape, dtype=dtype, device=self._device)

        received: torch.Tensor = self._call_group(lambda group: group.recv_new(allocate, peer_rank))
        return received

    def allgather(self, send_buf: torch.Tensor, recv_buf: torch.Tensor) -> None:
        """Put all ranks' ``send_buf``, one after the other, into ``recv_buf``, which any stream may then read."""
        self._run_collective(lambda group: group.all_gather(send_buf, recv_buf))

    def allreduce(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Reduce all ranks' ``send_buf`` by ``op`` into ``recv_buf``, which any stream may then read."""
        self._run_collective(lambda group: group.all_reduce(send_buf, recv_buf, op.name.lower()))

    def reducescatter(self, send_buf: torch.Tensor, recv_buf: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Reduce all ranks' ``send_buf`` by ``op``, and put this rank's part into ``recv_buf`` for any stream."""
        self._run_collective(lambda group: group.reduce_scatter(send_buf, recv_buf, op.name.lower()))

    def broadcast(self, buf: torch.Tensor, root_rank: int) -> None:
        """Copy ``buf`` of ``root_rank`` into that of all ranks. Not in Ray's interface up to 2.60."""
        self._run_collective(lambda group: group.broadcast(buf, root_rank))

    @property
    def recv_stream(self) -> Any:
        """A context with a stream to read in: Ray asks for it with _overlap_gpu_communication."""
        return self._stream_contexts[0]

    @property
    def send_stream(self) -> Any:
        """A context with a stream to write in: Ray asks for it with _overlap_gpu_communication."""
        return self._stream_contexts[1]

    @property
    def group(self) -> Group:
        """The communicator of HCCL. Raises RayChannelError where it is not connected."""
        if self._group is None:
            raise RayChannelError(
                "VRA-524: This HcclCommunicator is not connected: Ray connects it when a graph is compiled."
            )
        return self._group

    def abort(self, reason: str) -> None:
        """End all transfers, from any thread, and with them the graph: waits raise with ``reason``."""
        if self._group is not None:
            self._group.abort(reason)

    def destroy(self) -> None:
        """End the communicator, from any thread and at any time; peers that wait for this rank get an error."""
        self._destroyed = True
        if self._group is not None:
            self._group.destroy()

    def get_transport_name(self) -> str:
        """Return Ray's name of transports other than host memory: it accepts no other name."""
        name: str = TorchTensorType.ACCELERATOR
        return name

    @classmethod
    def generate_communicator_id(cls) -> str:
        """Return the root info of a new communicator, created on this actor's NPU.

        Ray calls it in the first actor of a group.
        """
        accelerator_context.prepare_network()
        return _create_root_info().hex()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the connection: Ray sets the rank of an actor later, by `initialize`."""
        unconnected = {"_rank": None, "_group": None, "_last_send": None, "_destroyed": False}
        return {"_handles": self._handles, "_comm_id": self._comm_id} | unconnected

    @cached_property
    def _stream_contexts(self) -> tuple[Any, Any]:
        """The same objects at each call: Ray compares those of several channels."""
        npu = get_accelerator("npu")
        npu.bind_thread(self.group.device)
        return npu.stream_context(npu.create_stream()), npu.stream_context(npu.create_stream())

    @property
    def _device(self) -> Any:
        return get_accelerator("npu").torch_device(self.group.device)

    def _run_collective(self, enqueue: Callable[[Group], Transfer]) -> None:
        self._call_group(lambda group: enqueue(group).wait())

    def _call_group(self, call: Callable[[Group], Any]) -> Any:
        """Return the result of ``call``. What it raises after `destroy` is a RayChannelError."""
        try:
            return call(self.group)
        except TransferAbortedError as error:
            if not self._destroyed:
                raise
            raise RayChannelError(str(error)) from error


def _create_root_info() -> bytes:
    """Return a root info for other actors, with this node's address as Ray knows it."""
    return create_root_info(accelerator_context.get_actor_device().index, str(ray.util.get_node_ip_address()))


def _set_npu_context(actor: Any) -> None:
    """Set the accelerator context of NPUs in an actor."""
    AcceleratorContext.set(accelerator_context.NpuContext(HcclCommunicator))
