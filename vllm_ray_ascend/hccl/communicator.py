"""One communicator of HCCL, without Ray: sends, receives and collectives of NPU tensors, each with a time limit.

All operations of a communicator run in one stream of its own (stream.py), since HCCL runs one operation of a
communicator at a time. That stream waits for the caller's by events, and the caller's for it where the caller may
overwrite what is being sent. After an error on the device the process is unusable (device_error.py).

HCCL makes the links of an operator in its first call, which waits in the host for the peers. `Group.connect` does that,
in one order on all ranks. No lock is held in a call of HCCL: what ends the group never waits for one that hangs.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.errors import (
    CaptureError,
    HcclError,
    TransferAbortedError,
    TransferLateError,
    VllmRayAscendError,
)
from vllm_ray_ascend.hccl import types
from vllm_ray_ascend.hccl.device_error import declare_unusable, raise_if_unusable
from vllm_ray_ascend.hccl.library import HCCL_E_AGAIN, HCCL_E_REMOTE, BatchItem, Buffer, hccl_error, load_library
from vllm_ray_ascend.hccl.limits import connect_limit_s, op_wait_timeout_s, transfer_limit_s
from vllm_ray_ascend.hccl.peers import GRACE_S, add_address, connect_peers
from vllm_ray_ascend.hccl.stream import AclEvent, AclStream, set_op_wait_timeout
from vllm_ray_ascend.hccl.watchdog import watch_group
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

_POLL_S = 0.05  # how soon a wait notices what does not end the operation on the device
_DESTROY_S = 2.0  # for which the caller of abort or destroy waits at most
_HANG_S = 1.0  # for which a call in progress may end by itself before the communicator is destroyed below it
_DESTROY_LIMIT_S = 60.0  # for which HcclCommDestroy is tried again while it answers "in use"
_DESTROY_PAUSE_S = 0.1
_LOST_WAIT_S = 0.5  # for which a peer's connection may take to report its end, where HCCL was quicker
_STATUS_S = 0.001

_LINK_ELEMENTS = (1, 1 << 17)
"""Of float32, for collectives: HCCL has other algorithms, with links of their own, above 256 KB."""

OPERATIONS = ("send", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "exchange")
"""Operators whose links `Group.connect` makes, in this order: "send" is for receives as well."""


def create_root_info(device: int, host: str | None = None) -> bytes:
    """Return what the ranks of a new communicator need; called by the process that is to be its rank 0.

    ``device`` is a visible index. It is opened on the calling thread. With ``host``, this node's address for the other
    ranks, all ranks are connected by TCP as well: without that, no rank notices that a process of its node has died.
    """
    raise_if_unusable("communicator")
    npu = get_accelerator("npu")
    npu.bind_thread(device)
    with npu.exclude_captures("a new communicator"):
        root_info = load_library().create_root_info()
    return root_info if host is None else add_address(root_info, host, load().silence_s)


class Transfer:
    """A send, receive or collective that has been queued on the device."""

    def __init__(
        self,
        group: Group,
        what: str,
        event: AclEvent | None,
        caller_event: AclEvent | None = None,
        tensors: Sequence[Any] = (),
        peers: frozenset[int] | None = None,
    ) -> None:
        """Take the ``peers`` that it needs: None means all ranks."""
        self.what, self.event, self.caller_event, self.tensors = what, event, caller_event, tensors
        self.peers = peers
        self.waiting_threads = 0
        self._group = group
        self.restart_limit(group.limit_s)

    def restart_limit(self, limit_s: float) -> None:
        """Let the time limit be ``limit_s`` seconds from now."""
        self.limit_s, self.deadline = limit_s, time.monotonic() + limit_s

    def is_completed(self) -> bool:
        """Return whether the device has ended the transfer, with success or with an error."""
        return self._group.is_completed(self)

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until any stream may use the tensors: ``limit_s`` seconds from now, or the group's since its start.

        Raises TransferLateError, TransferAbortedError or HcclError; the first and the last end the group.
        """
        self._group.wait_for(self, limit_s)


class _Call(NamedTuple):
    """A call of HCCL in progress that queues an operation, which needs ``peers``: None means all ranks.

    It ends by ``deadline`` at the latest, though HCCL may make links in it, which waits for the peers.
    """

    what: str
    peers: frozenset[int] | None
    deadline: float


class Group:
    """This process's rank of a communicator. Thread-safe; each calling thread is left on the group's device."""

    def __init__(self, device: int, rank: int, size: int, root_info: bytes, limit_s: float | None = None) -> None:
        """Meet the other ranks, which returns once all are there; then call `connect`.

        ``device`` is a visible index, ``root_info`` what `create_root_info` returned on rank 0, ``limit_s`` the time
        limit of a transfer. Raises TensorTransportError for invalid ranks, and HcclError, which it also does after
        HCCL_CONNECT_TIMEOUT where not all ranks are there.
        """
        types.check_rank(rank, size, root_info)
        raise_if_unusable(f"communicator for rank {rank} of {size}")
        self.device, self.rank, self.size = device, rank, size
        self.limit_s = transfer_limit_s(load().transfer_limit_s, os.environ) if limit_s is None else limit_s
        self._npu = get_accelerator("npu")
        self._npu.watch_captures()
        self._npu.bind_thread(device)
        self._allocation_stream = _allocation_stream(device)
        self._hccl = load_library()
        self._end_reason: str | None = None
        self._error: Exception | None = None
        self._state = threading.Condition()  # guards the fields below; never held in a call of HCCL
        self._calls = 0  # in progress, that use the communicator: none begins after its end
        self._queueing_call: _Call | None = None
        self._pending: deque[Transfer] = deque()
        self._connect_deadline: float | None = None
        self._queueing = threading.Lock()  # HCCL takes one operation at a time
        self._peers = connect_peers(root_info, rank, size, connect_limit_s(os.environ), load().silence_s)
        try:
            with self._npu.exclude_captures("a new communicator", connect_limit_s(os.environ)):
                _limit_stream_waits()
                self._stream, self._comm = self._create(root_info)
        except BaseException:  # Ctrl-C too: the other ranks must not wait for this one
            self._peers.leave()
            raise
        self._peers.on_lost = self._on_peer_lost
        watch_group(self)

    def _create(self, root_info: bytes) -> tuple[AclStream, Any]:
        """Return the stream and HCCL's communicator; neither stays where the ranks do not meet."""
        stream = AclStream()
        try:
            return stream, self._hccl.init_communicator(self.size, root_info, self.rank)
        except BaseException:  # Ctrl-C too
            stream.destroy()
            raise

    def connect(self, operations: Sequence[str] = OPERATIONS, limit_s: float | None = None) -> Group:
        """Make the links for some of `OPERATIONS`, as all ranks do simultaneously, by transfers of a few elements.

        Returns this group, within ``limit_s`` seconds: by default what HCCL allows, HCCL_CONNECT_TIMEOUT and 20. Raises
        HcclError, or TransferLateError or TransferAbortedError where it was ended, by another thread for instance; any
        failure ends it. What is not connected makes its links in its first call, which waits for the peers as well, for
        as long as a transfer may take: an operator that was left out, or one of whose algorithms HCCL chooses another.
        """
        if self.size == 1:
            return self
        limit_s = connect_limit_s(os.environ) if limit_s is None else limit_s
        try:
            with self._npu.exclude_captures("connecting the ranks of a communicator", limit_s):
                self._bind_thread()
                deadline = self._connect_deadline = time.monotonic() + limit_s
                for transfer in list(self._queue_first_operations(operations)):
                    transfer.wait(max(0.0, deadline - time.monotonic()))
                self._connect_deadline = None
        except BaseException as error:  # no memory, Ctrl-C: the other ranks must not wait for this one
            self._end_communicator(f"could not be connected: {type(error).__name__}: {error}")
            raise
        return self

    def _queue_first_operations(self, operations: Sequence[str]) -> Iterator[Transfer]:
        import torch

        def new(count: int = 1) -> torch.Tensor:
            return torch.zeros(count, device=self._npu.torch_device(self.device))

        others = [rank for rank in range(self.size) if rank != self.rank]
        for operation in (each for each in OPERATIONS if each in operations):
            if operation == "send":
                for sender, receiver in _directions(self.size):
                    if self.rank == sender:
                        yield self.send(new(), receiver)
                    elif self.rank == receiver:
                        yield self.recv(new(), sender)
            elif operation == "exchange":
                yield self.exchange([(new(), rank) for rank in others], [(new(), rank) for rank in others])
            else:
                for count in _LINK_ELEMENTS:
                    yield self._queue_collective(operation, new, count)

    def _queue_collective(self, operation: str, new: Callable[[int], torch.Tensor], count: int) -> Transfer:
        if operation == "all_reduce":
            return self.all_reduce(new(count), new(count))
        if operation == "all_gather":
            return self.all_gather(new(count), new(count * self.size))
        if operation == "reduce_scatter":
            return self.reduce_scatter(new(count * self.size), new(count))
        return self.broadcast(new(count), 0)

    @property
    def name(self) -> str:
        """Name of this rank in messages."""
        return f"HCCL communicator of rank {self.rank} of {self.size} (npu:{self.device})"

    @property
    def end_reason(self) -> str | None:
        """Why the group can no longer be used; None while it can."""
        return self._end_reason

    # ---- point to point

    def send(self, tensor: torch.Tensor, peer: int, *, caller_waits: bool = True, copy: bool = False) -> Transfer:
        """Send what the calling thread's stream will have written. Returns immediately; that stream waits for the end.

        With ``caller_waits`` False the stream does not wait: then the tensor must not be overwritten before the
        transfer was waited for, unless a ``copy`` is sent, which that stream makes.
        """
        what = f"send of {types.describe_tensor(tensor)} to rank {peer}"
        types.check_peer_tensor(self, what, tensor, peer)
        data_type = types.transfer_data_type(str(tensor.dtype))

        def enqueue_send(stream: int) -> None:
            self._hccl.send(_tensor_buffer(plain, data_type), peer, self._comm, stream)

        with self._on_device(what):
            plain = self._npu.to_plain_format(tensor)
            if not plain.numel():
                return self._empty_transfer(what)
            if copy:
                if plain.data_ptr() == tensor.data_ptr():  # else it is a copy already
                    plain = plain.clone()
                # The caller may drop the tensor now, whose memory may be of another stream than the copy.
                tensor.record_stream(self._npu.current_stream())
            return self._enqueue_transfer(what, enqueue_send, (plain,), {peer}, caller_waits=caller_waits)

    def recv(self, tensor: torch.Tensor, peer: int) -> Transfer:
        """Receive into a tensor, after what the calling thread's stream has queued for it. Returns immediately."""
        what = f"receive of {types.describe_tensor(tensor)} from rank {peer}"
        with self._on_device(what):
            return self._enqueue_recv(what, tensor, peer)

    def recv_new(self, allocate: Callable[[], torch.Tensor], peer: int, limit_s: float | None = None) -> torch.Tensor:
        """Receive into the tensor that ``allocate`` returns, and wait; any stream may read it.

        It is allocated for a stream of its own, so that the receive need not wait for the calling thread's stream.
        """
        with self._on_device(f"receive from rank {peer}"):
            self._raise_if_ended(f"receive from rank {peer}", {peer})  # says more than what an allocation would
            caller = self._npu.current_stream()
            with self._npu.fast_stream_context(self._allocation_stream):
                tensor = allocate()
                what = f"receive of {types.describe_tensor(tensor)} from rank {peer}"
                transfer = self._enqueue_recv(what, tensor, peer)
        transfer.wait(limit_s)
        tensor.record_stream(caller)
        return tensor

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]]
    ) -> Transfer:
        """Send and receive several tensors, (tensor, peer) each, in one operation: no order of them can deadlock."""
        what = f"exchange of {len(sends)} sends and {len(recvs)} receives"
        for tensor, peer in sends:
            types.check_peer_tensor(self, what, tensor, peer)
        for tensor, peer in recvs:
            types.check_peer_tensor(self, what, tensor, peer, target=True)
        with self._on_device(what):
            plain_sends = [(self._npu.to_plain_format(tensor), peer) for tensor, peer in sends]
            rounds = _batches(
                [
                    BatchItem(sending, _tensor_buffer(tensor, types.transfer_data_type(str(tensor.dtype))), peer)
                    for sending, pairs in ((True, plain_sends), (False, recvs))
                    for tensor, peer in pairs
                    if tensor.numel()
                ]
            )
            if not rounds:
                return self._empty_transfer(what)

            def enqueue_batches(stream: int) -> None:
                for items in rounds:
                    self._hccl.batch_send_recv(items, self._comm, stream)

            tensors = [tensor for tensor, _ in (*plain_sends, *recvs)]
            peers = {item.peer for items in rounds for item in items}
            return self._enqueue_transfer(what, enqueue_batches, tensors, peers, caller_waits=True)

    # ---- collectives

    def all_reduce(self, source: torch.Tensor, target: torch.Tensor, op: str = "sum") -> Transfer:
        """Reduce all ranks' ``source`` by ``op`` (sum, product, max, min) into ``target``, which may be ``source``."""
        what = f"all-reduce ({op}) of {types.describe_tensor(source)}"
        data_type = types.reduction_data_type(str(source.dtype), op)
        types.check_collective(self, what, source, target, 1, 1)
        reduce_op = types.REDUCE_OPS[op]
        return self._enqueue_collective(
            what, source, target, lambda s, t, st: self._hccl.all_reduce(s, t, reduce_op, self._comm, st), data_type
        )

    def reduce_scatter(self, source: torch.Tensor, target: torch.Tensor, op: str = "sum") -> Transfer:
        """Reduce all ranks' ``source`` by ``op``, and put this rank's part, 1 / ``size`` of it, into ``target``."""
        what = f"reduce-scatter ({op}) of {types.describe_tensor(source)}"
        data_type = types.reduction_data_type(str(source.dtype), op)
        types.check_collective(self, what, source, target, 1, self.size)
        reduce_op = types.REDUCE_OPS[op]
        return self._enqueue_collective(
            what, source, target, lambda s, t, st: self._hccl.reduce_scatter(s, t, reduce_op, self._comm, st), data_type
        )

    def all_gather(self, source: torch.Tensor, target: torch.Tensor) -> Transfer:
        """Put all ranks' ``source``, one after the other, into ``target``, which has ``size`` times its elements."""
        what = f"all-gather of {types.describe_tensor(source)}"
        data_type = types.transfer_data_type(str(source.dtype))
        types.check_collective(self, what, source, target, self.size, 1)
        return self._enqueue_collective(
            what, source, target, lambda s, t, st: self._hccl.all_gather(s, t, self._comm, st), data_type
        )

    def broadcast(self, tensor: torch.Tensor, root: int) -> Transfer:
        """Copy the ``tensor`` of rank ``root`` into that of all other ranks."""
        what = f"broadcast of {types.describe_tensor(tensor)} from rank {root}"
        data_type = types.transfer_data_type(str(tensor.dtype))
        types.check_peer_tensor(self, what, tensor, root, target=True, allow_self=True)
        return self._enqueue_collective(
            what, tensor, tensor, lambda s, _, st: self._hccl.broadcast(s, root, self._comm, st), data_type
        )

    # ---- waiting and ending

    def wait_for(self, transfer: Transfer, limit_s: float | None = None) -> None:
        """Wait for a transfer, as `Transfer.wait` does."""
        if limit_s is not None:
            transfer.restart_limit(limit_s)
        while not self._wait_completed(transfer, max(0.0, min(_POLL_S, transfer.deadline - time.monotonic()))):
            self._raise_if_ended(transfer.what, transfer.peers, GRACE_S)
            if time.monotonic() >= transfer.deadline:
                raise self._end_with_error(self._late_error(transfer.what, transfer.limit_s))
        self._raise_if_ended(transfer.what)
        transfer.tensors = ()

    def is_completed(self, transfer: Transfer) -> bool:
        """Return what `Transfer.is_completed` does."""
        with self._on_device(transfer.what), self._state:
            return transfer.event is None or transfer.event.is_complete()

    def abort(self, reason: str) -> None:
        """End the communicator, from any thread: waits here raise with ``reason``, those of the peers fail."""
        self._end_communicator(f"was aborted: {reason}")

    def destroy(self) -> None:
        """End the communicator, from any thread and any number of times; waits fail, here and at the peers."""
        self._end_communicator("was destroyed")

    def poll(self) -> None:
        """Release completed transfers, and end the group where one is late or has failed. Called by the watchdog.

        Never waits for anything.
        """
        deadline = self._connect_deadline
        if deadline is not None and time.monotonic() >= deadline:
            self._end_with_error(self._late_connect_error(), wait_s=0)
            return
        call = self._queueing_call  # another thread ends it
        if call is not None and time.monotonic() >= call.deadline:
            self._end_with_error(self._late_error(call.what, self.limit_s), wait_s=0)
            return
        with suppress(VllmRayAscendError), self._on_device("a check of transfers"):  # the group's next call raises it
            oldest = self._release_completed()
            if oldest is None:
                return
            self._raise_if_ended(oldest.what, oldest.peers, GRACE_S, wait_s=0)
            try:
                self._check_stream(oldest.what)
            except HcclError as error:
                self._end_with_device_error(oldest, error, wait_s=0)
            if time.monotonic() >= oldest.deadline:
                self._end_with_error(self._late_error(oldest.what, oldest.limit_s), wait_s=0)

    # ---- private

    def _enqueue_recv(self, what: str, tensor: torch.Tensor, peer: int) -> Transfer:
        types.check_peer_tensor(self, what, tensor, peer, target=True)
        data_type = types.transfer_data_type(str(tensor.dtype))

        def enqueue_recv(stream: int) -> None:
            self._hccl.recv(_tensor_buffer(tensor, data_type), peer, self._comm, stream)

        if not tensor.numel():
            return self._empty_transfer(what)
        return self._enqueue_transfer(what, enqueue_recv, (tensor,), {peer})

    def _enqueue_collective(
        self,
        what: str,
        source: torch.Tensor,
        target: torch.Tensor,
        collective: Callable[[Buffer, Buffer, int], None],
        data_type: int,
    ) -> Transfer:
        with self._on_device(what):
            plain = self._npu.to_plain_format(source)
            if not plain.numel():
                return self._empty_transfer(what)

            def enqueue_collective(stream: int) -> None:
                collective(_tensor_buffer(plain, data_type), _tensor_buffer(target, data_type), stream)

            return self._enqueue_transfer(what, enqueue_collective, (plain, target))

    @contextmanager
    def _on_device(self, what: str) -> Iterator[None]:
        """Run the block on the group's device, while no graph is captured."""
        with self._npu.exclude_captures(what):
            self._bind_thread()
            yield

    def _bind_thread(self) -> None:
        if _bound.device != self.device or self._npu.current_device() != self.device:
            self._npu.bind_thread(self.device)
            _bound.device = self.device

    def _enqueue_transfer(
        self,
        what: str,
        call: Callable[[int], None],
        tensors: Sequence[torch.Tensor],
        peers: Collection[int] | None = None,
        *,
        caller_waits: bool = False,
    ) -> Transfer:
        """Append ``call``, which needs ``peers`` (None: all), to the group's stream, after the caller's work up to now.

        With ``caller_waits`` the caller's stream waits for the end of the transfer before its later work.
        """
        caller = self._npu.current_stream()
        needed = None if peers is None else frozenset(peers)
        events: list[AclEvent] = []
        with self._queue_operation(what, needed):
            try:
                if (caller_event := self._stream.wait_for_stream(caller)) is not None:
                    events.append(caller_event)
                call(self._stream.handle)
                event = self._stream.record_event()
                events.append(event)
                if caller_waits:
                    event.block_stream(caller)
            except HcclError as error:
                self._discard_events(events)
                raise self._end_with_host_error(what, needed, error) from error
            with self._state:
                transfer = Transfer(self, what, event, caller_event, tensors, needed)
                self._pending.append(transfer)
        self._raise_if_ended(what)  # by another thread, while HCCL had the call
        self._release_completed()
        if caller_waits:
            for tensor in tensors:
                tensor.record_stream(caller)
            transfer.tensors = ()
        return transfer

    @contextmanager
    def _queue_operation(self, what: str, peers: frozenset[int] | None) -> Iterator[None]:
        """Let the body alone queue an operation. Raises where the group has ended, or a peer is gone."""
        while not self._queueing.acquire(timeout=_POLL_S):
            self._raise_if_ended(what)
        try:
            self._raise_if_ended(what, peers)
            raise_if_unusable(what)
            with self._calling(what):
                deadline = self._connect_deadline or time.monotonic() + self.limit_s
                self._queueing_call = _Call(what, peers, deadline)
                yield
        finally:
            self._queueing_call = None
            self._queueing.release()

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Register a call that uses the communicator or its stream."""
        with self._state:
            if self._end_reason is not None:
                raise self._cause_of_end(what)
            self._calls += 1
        try:
            yield
        finally:
            with self._state:
                self._calls -= 1
                self._state.notify_all()

    def _discard_events(self, events: Sequence[AclEvent]) -> None:
        """Have events of an operation that was not queued destroyed with the stream, which may wait for them."""
        with self._state:
            self._pending.extend(Transfer(self, "", event) for event in events)

    def _release_completed(self) -> Transfer | None:
        """Release events and tensors of completed transfers; return the oldest transfer that is not completed."""
        with self._state:
            while self._pending:
                transfer = self._pending[0]
                assert transfer.event is not None
                if transfer.waiting_threads or not transfer.event.is_complete():
                    return transfer
                self._release(self._pending.popleft())
            return None

    def _release(self, transfer: Transfer) -> None:
        for event in (transfer.event, transfer.caller_event):
            if event is not None:
                event.destroy()
        transfer.event, transfer.caller_event, transfer.tensors = None, None, ()

    def _empty_transfer(self, what: str) -> Transfer:
        """Return the completed transfer of an empty tensor: both sides know that it is empty, so nothing is sent."""
        self._raise_if_ended(what)
        return Transfer(self, what, None)

    def _wait_completed(self, transfer: Transfer, limit_s: float) -> bool:
        """Return whether a transfer has succeeded after ``limit_s`` seconds. The capture of a graph goes first."""
        with self._state:
            event = transfer.event
            if event is None:
                return True
            transfer.waiting_threads += 1
        try:
            with self._on_device(transfer.what):
                completed = event.synchronize(limit_s)
                self._check_stream(transfer.what)
                return completed
        except CaptureError:
            time.sleep(limit_s)
            return False
        except HcclError as error:
            self._raise_if_ended(transfer.what)  # HCCL's own reason, where it has one, says more than the event's
            raise self._end_with_device_error(transfer, error) from error
        finally:
            with self._state:
                transfer.waiting_threads -= 1
                self._state.notify_all()

    def _check_stream(self, what: str) -> None:
        """Raise HcclError where the stream has failed: its events may come nevertheless, or never."""
        with self._calling(what):
            self._stream.synchronize(_STATUS_S)

    def _raise_if_ended(
        self, what: str, peers: Collection[int] | None = (), grace_s: float = 0.0, wait_s: float = _DESTROY_S
    ) -> None:
        """Raise what has ended the group, in this process or in HCCL, or that one of ``peers`` (None: any) is gone."""
        with self._state:
            if self._end_reason is not None:
                raise self._cause_of_end(what)
            idle = not self._calls
        if lost := self._peers.lost_peer(peers, grace_s):
            raise self._end_with_error(self._lost_error(what, lost), wait_s)
        if idle:  # it might wait for a call that hangs
            with self._calling(what):
                code = self._hccl.get_async_error(self._comm)
            if code:
                raise self._end_with_error(hccl_error(f"{self.name}: {what}", code), wait_s)

    def _on_peer_lost(self, rank: int) -> None:
        """End the group where the call in progress waits for ``rank``, which nothing else would end soon."""
        time.sleep(GRACE_S)
        with self._state:
            call = self._queueing_call
            needed = call is not None and (call.peers is None or rank in call.peers)
        if needed or self._connect_deadline is not None:
            self._end_with_error(self._lost_error("link set-up", self._peers.lost_peer({rank})))

    def _end_with_host_error(self, what: str, peers: Collection[int] | None, error: HcclError) -> Exception:
        """End the group after a call of HCCL that failed, and return what to raise."""
        if self._end_reason is not None:
            return self._cause_of_end(what)
        lost = self._peers.wait_lost(peers, _LOST_WAIT_S)
        return self._end_with_error(
            self._lost_error(what, lost) if lost else hccl_error(f"{self.name}: {what}", error.hccl_code, str(error))
        )

    def _end_with_device_error(self, transfer: Transfer, error: HcclError, wait_s: float = _DESTROY_S) -> Exception:
        """End the group after an operation that failed on the device, which ends the use of it by this process."""
        lost = self._peers.wait_lost(transfer.peers, min(_LOST_WAIT_S, wait_s))
        declare_unusable(f"{self.name}: {transfer.what}: {lost or error}")
        cause = (
            self._lost_error(transfer.what, f"{lost} ({error})")
            if lost
            else hccl_error(f"{self.name}: {transfer.what}", error.hccl_code, str(error))
        )
        return self._end_with_error(cause, wait_s)

    def _cause_of_end(self, what: str) -> Exception:
        """Return the first cause: an error, or that this process has ended the group, which fails what it waits for."""
        return self._error or TransferAbortedError(
            "VRA-515",
            f"{self.name} {self._end_reason}, so there is no {what}. Make a new communicator; where that was not "
            "intended, look for the first error in the logs of all ranks.",
        )

    def _lost_error(self, what: str, lost: str) -> HcclError:
        return HcclError(
            "VRA-543",
            f"{self.name}: {what} cannot end: {lost}. See the log of that process. Where a transfer was in progress, "
            "this process cannot use its NPU any more: replace it too.",
            HCCL_E_REMOTE,
        )

    def _late_connect_error(self) -> TransferLateError:
        call = self._queueing_call  # another thread ends it
        waits_for = call.what if call else "an operation that is queued"
        return TransferLateError(
            "VRA-548",
            f"{self.name}: not all ranks have made their links in time: {waits_for} has not ended. The other rank is "
            "late, stopped, connects for other operations, or waits for one that does: look for the first error in the "
            "logs of all ranks. If it needs longer, raise HCCL_CONNECT_TIMEOUT (120 to 7200) on all of them.",
        )

    def _late_error(self, what: str, limit_s: float) -> TransferLateError:
        return TransferLateError(
            "VRA-516",
            f"{self.name}: {what} has not ended after {limit_s:g} s. The other rank is late, "
            "stopped or does something else: look for the first error in the logs of all ranks. If it needs longer, "
            "raise VLLM_RAY_ASCEND_TRANSFER_LIMIT_S (and HCCL_EXEC_TIMEOUT above it).",
        )

    def _end_with_error(self, error: Exception, wait_s: float = _DESTROY_S) -> Exception:
        """End the group with ``error``, which every later call to the group raises; return the first such error."""
        with self._state:
            if self._end_reason is None:
                self._error = error
        self._end_communicator("has failed", wait_s)
        return self._error or error

    def _end_communicator(self, reason: str, wait_s: float = _DESTROY_S) -> None:
        """Let no call begin any more, and have a thread destroy the communicator; wait for that at most ``wait_s``."""
        with self._state:
            if self._end_reason is not None:
                return
            self._end_reason = reason
            self._connect_deadline = None
        destroyed = threading.Event()
        threading.Thread(
            target=self._destroy_communicator, args=(destroyed,), name="RayAscendHcclDestroy", daemon=True
        ).start()
        destroyed.wait(wait_s)

    def _destroy_communicator(self, destroyed: threading.Event) -> None:
        """Destroy the communicator, then its stream and events, and set ``destroyed``.

        A call that hangs in link set-up is ended by that, as CANN documents; others are given the time to end.
        """
        try:
            self._npu.bind_thread(self.device)
            with self._state:
                self._state.wait_for(lambda: not self._calls, _HANG_S)
            self._destroy_when_unused()
            self._peers.leave()
            destroyed.set()
            with self._state:
                self._state.wait_for(lambda: not self._calls)
            self._destroy_stream()
        except (HcclError, RuntimeError) as error:
            logger.warning("VRA-517: %s could not be destroyed: %s", self.name, error)
        finally:
            self._peers.leave()
            destroyed.set()

    def _destroy_when_unused(self) -> None:
        """Destroy the communicator, again and again while HCCL says that it is in use."""
        deadline = time.monotonic() + _DESTROY_LIMIT_S
        while True:
            try:
                self._hccl.destroy_communicator(self._comm)
                return
            except HcclError as error:
                if error.hccl_code != HCCL_E_AGAIN or time.monotonic() >= deadline:
                    raise
            time.sleep(_DESTROY_PAUSE_S)

    def _destroy_stream(self) -> None:
        """Destroy the stream once its work has ended, and then the events: a producer that hangs may hold it up."""
        try:
            while not self._stream.synchronize(_DESTROY_S):
                pass
        except HcclError as error:
            declare_unusable(f"{self.name} {self._end_reason}: {self._error or error}")
        self._stream.destroy()
        with self._state:
            self._state.wait_for(lambda: not any(each.waiting_threads for each in self._pending))
            while self._pending:
                self._release(self._pending.popleft())


def _directions(size: int) -> Iterator[tuple[int, int]]:
    """Yield sender and receiver of all pairs in the order in which all ranks make their links: none waits in a ring."""
    for lower in range(size):
        for higher in range(lower + 1, size):
            yield lower, higher
            yield higher, lower


def _batches(items: Sequence[BatchItem]) -> list[list[BatchItem]]:
    """Divide items into batches with one for each peer and direction, which is what HCCL takes up to CANN 8.5."""
    counts: Counter[tuple[bool, int]] = Counter()
    batches: list[list[BatchItem]] = []
    for item in items:
        number = counts[item.sending, item.peer]
        counts[item.sending, item.peer] += 1
        if number == len(batches):
            batches.append([])
        batches[number].append(item)
    return batches


@cache
def _limit_stream_waits() -> None:
    """Limit the waits of this process's streams, once: torch_npu does so only where it makes a process group."""
    set_op_wait_timeout(op_wait_timeout_s(os.environ))


@cache
def _allocation_stream(device: int) -> Any:
    """Return the stream that owns the memory of received tensors, and does nothing else: one for each device."""
    return get_accelerator("npu").create_stream()


class _BoundThread(threading.local):
    """The device to which this module has bound a thread: torch says 0 of a thread that has opened none."""

    device: int | None = None


_bound = _BoundThread()


def _tensor_buffer(tensor: torch.Tensor, data_type: int) -> Buffer:
    return Buffer(tensor.data_ptr(), tensor.numel(), data_type)
