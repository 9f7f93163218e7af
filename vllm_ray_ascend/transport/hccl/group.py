"""One communicator of HCCL, without Ray: sends, receives and collectives of NPU tensors, each with a time limit.

All that a communicator does runs in one stream of its own (lane.py), since HCCL runs one operation of a communicator at
a time. That stream waits for the caller's by events, and the caller's for it where the caller may write what is being
sent; an error of HCCL, which ends a stream for good, so leaves the caller's streams alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.errors import (
    CaptureError,
    HcclError,
    TransferAbortedError,
    TransferLateError,
    VllmRayAscendError,
)
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load
from vllm_ray_ascend.transport.hccl import check, types
from vllm_ray_ascend.transport.hccl.lane import Lane
from vllm_ray_ascend.transport.hccl.library import Buffer, Part, failure, library
from vllm_ray_ascend.transport.hccl.limits import limit
from vllm_ray_ascend.transport.hccl.transfer import Transfer
from vllm_ray_ascend.transport.hccl.watch import watch

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

_LOOK_S = 0.05  # how soon a wait notices an abort that the device does not end by itself
_DESTROY_S = 2.0  # HcclCommDestroy may wait for the device; whoever ends a communicator does not wait for that
_CLOSE_S = 0.5  # likewise of its stream


def new_root(device: int) -> bytes:
    """What the ranks of a new communicator need, made by its rank 0. Opens the device on the calling thread."""
    npu = accelerator("npu")
    npu.bind_thread(device)
    with npu.guard("a new communicator"):
        return library().root_info()


class Group:
    """This process's rank of a communicator. For any number of threads; each is left on the group's device."""

    def __init__(self, device: int, rank: int, size: int, root: bytes, limit_s: float | None = None) -> None:
        """Returns once all ranks have come. ``device`` is a visible index, ``root`` what `new_root` gave to all.

        Raises TensorTransportError for ranks that cannot be, and HcclError, which after HCCL_CONNECT_TIMEOUT says that
        not all came.
        """
        check.place(rank, size, root)
        self.device, self.rank, self.size = device, rank, size
        self.limit_s = limit(load().transfer_limit_s, os.environ) if limit_s is None else limit_s
        self._npu = accelerator("npu")
        self._npu.watch_captures()
        self._npu.bind_thread(device)
        self._memory = _memory_stream(device)
        self._hccl = library()
        self._ended: str | None = None
        self._failed: Exception | None = None
        self._calls = threading.RLock()  # around calls that name the communicator: none comes after its end
        self._pending: deque[Transfer] = deque()
        with self._npu.guard("a new communicator"):
            self._lane = Lane()
            self._comm = self._hccl.connect(size, root, rank)
        watch(self)

    # ---- from one to another

    def send(self, tensor: torch.Tensor, peer: int, *, caller_waits: bool = True) -> Transfer:
        """Send what the calling thread's stream will have written. Returns at once; that stream waits for the end.

        With ``caller_waits`` False it does not: then nobody writes to the tensor before the transfer was waited for.
        """
        what = f"send of {check.words(tensor)} to rank {peer}"
        check.pair(self, what, tensor, peer)
        number = types.to_move(str(tensor.dtype))

        def post(stream: int) -> None:
            self._hccl.send(_buffer(plain, number), peer, self._comm, stream)

        with self._on_device(what):
            plain = self._npu.plain(tensor)
            return self._post(what, post, (plain,), caller_waits=caller_waits) if plain.numel() else self._nothing(what)

    def recv(self, tensor: torch.Tensor, peer: int) -> Transfer:
        """Receive into a tensor, after what the calling thread's stream still does with it. Returns at once."""
        what = f"receive of {check.words(tensor)} from rank {peer}"
        with self._on_device(what):
            return self._recv(what, tensor, peer)

    def recv_new(self, make: Callable[[], torch.Tensor], peer: int, limit_s: float | None = None) -> torch.Tensor:
        """Receive into a tensor that ``make`` makes, and wait; any stream may read it.

        It is made for a stream of its own, so that it need not wait for what the calling thread's does.
        """
        with self._on_device(f"receive from rank {peer}"):
            caller = self._npu.current_stream()
            with self._npu.in_stream(self._memory):
                tensor = make()
                transfer = self._recv(f"receive of {check.words(tensor)} from rank {peer}", tensor, peer)
        transfer.wait(limit_s)
        tensor.record_stream(caller)
        return tensor

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]]
    ) -> Transfer:
        """Send and receive at once, (tensor, peer) each: no order among them can block the others."""
        what = f"exchange of {len(sends)} sends and {len(recvs)} receives"
        for tensor, peer in sends:
            check.pair(self, what, tensor, peer)
        for tensor, peer in recvs:
            check.pair(self, what, tensor, peer, target=True)
        with self._on_device(what):
            out = [(self._npu.plain(tensor), peer) for tensor, peer in sends]
            parts = [
                Part(sending, _buffer(tensor, types.to_move(str(tensor.dtype))), peer)
                for sending, pairs in ((True, out), (False, recvs))
                for tensor, peer in pairs
                if tensor.numel()
            ]
            if not parts:
                return self._nothing(what)
            tensors = [tensor for tensor, _ in (*out, *recvs)]
            return self._post(
                what, lambda stream: self._hccl.batch(parts, self._comm, stream), tensors, caller_waits=True
            )

    # ---- of all

    def all_reduce(self, source: torch.Tensor, target: torch.Tensor, op: str = "sum") -> Transfer:
        """``target``, which may be ``source``, becomes the ``op`` (sum, product, max, min) over all ranks."""
        what = f"all-reduce ({op}) of {check.words(source)}"
        number = types.to_reduce(str(source.dtype), op)
        check.collective(self, what, source, target, 1, 1)
        reduction = types.REDUCTIONS[op]
        return self._collective(
            what, source, target, lambda s, t, st: self._hccl.all_reduce(s, t, reduction, self._comm, st), number
        )

    def reduce_scatter(self, source: torch.Tensor, target: torch.Tensor, op: str = "sum") -> Transfer:
        """``target`` becomes this rank's part of the ``op`` over all ranks' ``source``, of ``size`` times its size."""
        what = f"reduce-scatter ({op}) of {check.words(source)}"
        number = types.to_reduce(str(source.dtype), op)
        check.collective(self, what, source, target, 1, self.size)
        reduction = types.REDUCTIONS[op]
        return self._collective(
            what, source, target, lambda s, t, st: self._hccl.reduce_scatter(s, t, reduction, self._comm, st), number
        )

    def all_gather(self, source: torch.Tensor, target: torch.Tensor) -> Transfer:
        """``target``, of ``size`` times the size of ``source``, becomes all ranks' ``source`` one after the other."""
        what = f"all-gather of {check.words(source)}"
        number = types.to_move(str(source.dtype))
        check.collective(self, what, source, target, self.size, 1)
        return self._collective(
            what, source, target, lambda s, t, st: self._hccl.all_gather(s, t, self._comm, st), number
        )

    def broadcast(self, tensor: torch.Tensor, root: int) -> Transfer:
        """All ranks' ``tensor`` becomes that of rank ``root``."""
        what = f"broadcast of {check.words(tensor)} from rank {root}"
        number = types.to_move(str(tensor.dtype))
        check.pair(self, what, tensor, root, target=True, itself=True)
        return self._collective(
            what, tensor, tensor, lambda s, _, st: self._hccl.broadcast(s, root, self._comm, st), number
        )

    # ---- the end

    @property
    def ended(self) -> str | None:
        """Why the group is of no more use; None while it is."""
        return self._ended

    def wait(self, transfer: Transfer, limit_s: float | None = None) -> None:
        """As `Transfer.wait`."""
        if limit_s is not None:
            transfer.limit_by(limit_s)
        while not self._came(transfer, max(0.0, min(_LOOK_S, transfer.end - time.monotonic()))):
            self._raise_if_over(transfer.what)
            if time.monotonic() >= transfer.end:
                raise self._fail(self._late(transfer))
        self._raise_if_over(transfer.what)
        transfer.keep = ()

    def done(self, transfer: Transfer) -> bool:
        """As `Transfer.done`."""
        with self._on_device(transfer.what), self._calls:
            return transfer.mark is None or transfer.mark.passed()

    def abort(self, reason: str) -> None:
        """End the communicator, from any thread: what waits here raises with ``reason``, what waits at peers fails."""
        self._end(f"was aborted: {reason}")

    def destroy(self) -> None:
        """End the communicator, from any thread and more than once; what still waits fails, here and at its peers."""
        self._end("was destroyed")

    def look(self) -> None:
        """Forget transfers that are over, end the group if one is late or failed. Called by the watch, now and then."""
        with suppress(CaptureError), self._on_device("look at transfers"):
            late = self._sweep()
            try:
                self._raise_if_over("transfer")
            except VllmRayAscendError:  # kept for whoever uses the group next
                return
            if late is not None and time.monotonic() >= late.end:
                self._fail(self._late(late))

    # ---- inside

    def _recv(self, what: str, tensor: torch.Tensor, peer: int) -> Transfer:
        check.pair(self, what, tensor, peer, target=True)
        number = types.to_move(str(tensor.dtype))

        def post(stream: int) -> None:
            self._hccl.recv(_buffer(tensor, number), peer, self._comm, stream)

        return self._post(what, post, (tensor,)) if tensor.numel() else self._nothing(what)

    def _collective(
        self,
        what: str,
        source: torch.Tensor,
        target: torch.Tensor,
        call: Callable[[Buffer, Buffer, int], None],
        number: int,
    ) -> Transfer:
        with self._on_device(what):
            plain = self._npu.plain(source)
            if not plain.numel():
                return self._nothing(what)

            def post(stream: int) -> None:
                call(_buffer(plain, number), _buffer(target, number), stream)

            return self._post(what, post, (plain, target))

    @contextmanager
    def _on_device(self, what: str) -> Iterator[None]:
        """The calling thread is on the group's device, and no graph is captured meanwhile."""
        with self._npu.guard(f"a {what}"):
            self._bind()
            yield

    def _bind(self) -> None:
        if _bound.device != self.device or self._npu.current_device() != self.device:
            self._npu.bind_thread(self.device)
            _bound.device = self.device

    def _post(
        self, what: str, call: Callable[[int], None], tensors: Sequence[torch.Tensor], *, caller_waits: bool = False
    ) -> Transfer:
        """Append ``call`` to the group's stream, after what the caller's has; what that gets comes later, if asked."""
        caller = self._npu.current_stream()
        with self._calls:
            self._raise_if_over(what)
            before = self._lane.after(caller)
            call(self._lane.stream)
            mark = self._lane.mark()
            transfer = Transfer(self, what, mark, before, tensors)
            self._sweep()
            self._pending.append(transfer)
            if caller_waits:
                mark.before(caller)
        if caller_waits:
            for tensor in tensors:
                tensor.record_stream(caller)
            transfer.keep = ()
        return transfer

    def _sweep(self) -> Transfer | None:
        """Forget transfers that are over; the first that is not."""
        with self._calls:
            while self._pending:
                transfer = self._pending[0]
                assert transfer.mark is not None
                if transfer.waiting or not transfer.mark.passed():
                    return transfer
                transfer.mark.close()
                if transfer.before is not None:
                    transfer.before.close()
                transfer.mark, transfer.keep = None, ()
                self._pending.popleft()
            return None

    def _nothing(self, what: str) -> Transfer:
        """An empty tensor: both sides know it, so nothing is sent."""
        self._raise_if_over(what)
        return Transfer(self, what, None)

    def _came(self, transfer: Transfer, limit_s: float) -> bool:
        """Whether a transfer is over after ``limit_s`` seconds. A capture of a graph goes first, and is waited for."""
        with self._calls:
            mark = transfer.mark
            if mark is None:
                return True
            transfer.waiting += 1
        try:
            with self._on_device(transfer.what):
                return mark.wait(limit_s)
        except CaptureError:
            time.sleep(limit_s)
            return False
        except HcclError as error:
            raise self._fail(error) from error
        finally:
            with self._calls:
                transfer.waiting -= 1

    def _raise_if_over(self, what: str) -> None:
        """Raise what has ended the group, here or in HCCL."""
        with self._calls:
            if self._ended is None:
                code = self._hccl.async_error(self._comm)
                if not code:
                    return
                self._fail(failure(f"{self.name}: {what}", code, self._lane.error()))
        if self._failed is not None:
            raise self._failed
        raise TransferAbortedError(
            f"{self.name} {self._ended}, so there is no {what}. Make a new communicator; where that was not meant, "
            "look for the first error in the logs of all ranks."
        )

    def _late(self, transfer: Transfer) -> TransferLateError:
        return TransferLateError(
            f"{self.name}: {transfer.what} has not ended after {transfer.limit_s:g} s. The other rank is late, "
            "stopped or does something else: look for the first error in the logs of all ranks. If it needs longer, "
            "raise VLLM_RAY_ASCEND_TRANSFER_LIMIT_S (and HCCL_EXEC_TIMEOUT above it)."
        )

    def _fail(self, error: Exception) -> Exception:
        """End the group with an error that whoever uses it from now on gets."""
        if self._failed is None and self._ended is None:
            self._failed = error
        self._end("has failed")
        return error

    def _end(self, reason: str) -> None:
        if not self._calls.acquire(timeout=_DESTROY_S):
            # A call into HCCL hangs. It names the communicator, so that is left to the process's end.
            self._ended = self._ended or reason
            return
        try:
            if self._ended is not None:
                return
            self._ended = reason
        finally:
            self._calls.release()
        gone = threading.Event()
        threading.Thread(target=self._destroy, args=(gone,), name="hccl-destroy", daemon=True).start()
        gone.wait(_DESTROY_S)

    def _destroy(self, gone: threading.Event) -> None:
        """As the stream may wait for one of the caller's, or on an NPU until HCCL's own limit, it may go only later."""
        try:
            self._npu.bind_thread(self.device)
            self._hccl.destroy(self._comm)
            closed = self._lane.close(_CLOSE_S)
            gone.set()
            while not closed:
                closed = self._lane.close(_DESTROY_S)
        except (HcclError, RuntimeError) as error:
            logger.warning("%s: %s", self.name, error)
        finally:
            gone.set()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"HCCL communicator of rank {self.rank} of {self.size} (npu:{self.device})"


@cache
def _memory_stream(device: int) -> Any:
    """Owns the memory that tensors are received into, and does nothing else: one for all groups of a device."""
    return accelerator("npu").new_stream()


class _Bound(threading.local):
    """The device that a thread was bound to here: torch says 0 of a thread that has opened none."""

    device: int | None = None


_bound = _Bound()


def _buffer(tensor: torch.Tensor, number: int) -> Buffer:
    return Buffer(tensor.data_ptr(), tensor.numel(), number)
