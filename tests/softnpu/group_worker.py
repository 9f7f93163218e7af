"""One rank of a test of hccl.communicator.Group, on the real torch_npu. A scenario is a function."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_npu  # noqa: F401  before the forks

from tests.softnpu.device import gated
from tests.softnpu.runtime import runtime
from vllm_ray_ascend.errors import (
    CaptureError,
    HcclError,
    TensorTransportError,
    TransferAbortedError,
    TransferLateError,
)
from vllm_ray_ascend.hccl import device_error
from vllm_ray_ascend.hccl.communicator import Group, create_root_info

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
running: list[str] = []
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def root_info(scenario: str) -> bytes:
    """Return what rank 0 has created, passed to the others through a file."""
    path = FOLDER / f"{scenario}.root"
    if RANK == 0:
        path.with_suffix(".partial").write_bytes(create_root_info(RANK, "127.0.0.1"))
        path.with_suffix(".partial").rename(path)
    await_file(path)
    return path.read_bytes()


def group(size: int = SIZE, limit_s: float | None = 40) -> Group:
    return Group(RANK, RANK, size, root_info(running[-1]), limit_s).connect()


def mark(name: str) -> None:
    (FOLDER / f"{running[-1]}.{name}").touch()


def await_mark(name: str) -> None:
    await_file(FOLDER / f"{running[-1]}.{name}")


def await_file(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.005)


def make_tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the same tensor on every rank, with bytes of every value."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for each in shape:
        count *= each
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (count * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: NaNs are equal too."""
    return bool(torch.equal(got.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)))


def basic() -> None:
    """Types and shapes between neighbours in a ring, and all collectives."""
    own = group()
    following, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for seed, dtype in enumerate(TYPES):
        for shape in ((5,), (0,), (3, 0, 2), (17, 33), (1,)):
            mine, theirs = (make_tensor(100 * rank + seed, shape, dtype) for rank in (RANK, before))
            target = torch.empty(shape, dtype=dtype, device="npu")
            own.exchange([(mine.npu(), following)], [(target, before)]).wait()
            assert same(target, theirs), (dtype, shape)
    turned = torch.arange(12.0).reshape(3, 4).npu().t()
    if RANK == 0:
        own.send(turned, 1)
    if RANK == 1:
        assert torch.equal(own.recv_new(lambda: torch.empty(4, 3, device="npu"), 0).cpu(), turned.cpu())
    source = torch.arange(8.0).npu() + RANK
    total = torch.empty_like(source)
    own.all_reduce(source, total).wait()
    assert torch.equal(total.cpu(), torch.arange(8.0) * SIZE + sum(range(SIZE)))
    own.all_reduce(source, source, "max").wait()
    assert torch.equal(source.cpu(), torch.arange(8.0) + SIZE - 1)
    everyone = torch.empty(2 * SIZE, dtype=torch.int64, device="npu")
    own.all_gather(torch.full((2,), RANK, device="npu"), everyone).wait()
    assert everyone.cpu().tolist() == [rank for rank in range(SIZE) for _ in range(2)]
    part = torch.empty(3, dtype=torch.int32, device="npu")
    own.reduce_scatter(torch.arange(3 * SIZE, dtype=torch.int32, device="npu"), part).wait()
    assert part.cpu().tolist() == [SIZE * (3 * RANK + i) for i in range(3)]
    value = torch.full((4,), float(RANK), device="npu")
    own.broadcast(value, SIZE - 1).wait()
    assert value.cpu().tolist() == [SIZE - 1.0] * 4
    own.all_reduce(value, value).wait()  # a rank that left now would be lost to one that has yet to begin the broadcast
    torch.npu.synchronize()
    own.destroy()
    own.destroy()


def many() -> None:
    """COUNT sends of random sizes, types and senders' streams, each with its checksum; no mismatch."""
    own, count = group(), int(os.environ["COUNT"])
    random.seed(7)
    spare, wrong = torch.npu.Stream(), 0
    plan = [(random.randrange(2), random.randrange(0, 4000), random.choice(TYPES)) for _ in range(count)]
    sums = torch.zeros(count, dtype=torch.int64, device="npu")
    for number, (sender, size, dtype) in enumerate(plan):
        if sender == RANK:
            with torch.npu.stream(spare) if number % 3 == 0 else torch.npu.stream(torch.npu.default_stream()):
                value = torch.full((size,), number % 100, device="npu").to(dtype)
                own.send(value, 1 - RANK)
                value.zero_()  # the send comes first
        else:
            got = own.recv_new(functools.partial(torch.empty, size, dtype=dtype, device="npu"), sender)
            sums[number] = (got.float() != torch.tensor(float(number % 100)).to(dtype).float().item()).sum()
    torch.npu.synchronize()
    wrong = int(sums.sum())
    assert wrong == 0, f"{wrong} wrong elements"
    own.destroy()


def large() -> None:
    """256 MB there and back, changed meanwhile, and the memory given back."""
    own = group()
    pattern = torch.arange(64 << 20, dtype=torch.int32)
    if RANK == 0:
        own.send(pattern.npu(), 1)
        back = own.recv_new(lambda: torch.empty(64 << 20, dtype=torch.int32, device="npu"), 1)
        assert torch.equal(back.cpu(), pattern + 1)
        del back
    else:
        got = own.recv_new(lambda: torch.empty(64 << 20, dtype=torch.int32, device="npu"), 0)
        own.send(got.add_(1), 0)
        del got
    torch.npu.synchronize()
    torch.npu.empty_cache()
    assert torch.npu.memory_reserved() < 64 << 20, torch.npu.memory_reserved()
    own.destroy()


def order() -> None:
    """Order a send after its producer and before later writes; a receive is complete when it returns."""
    own = group()
    if RANK == 1:
        for expected in (5.0, 6.0):
            got = own.recv_new(lambda: torch.empty(1000, device="npu"), 0)
            assert got.cpu().unique().tolist() == [expected], got
        return
    for value in (5.0, 6.0):
        producer = torch.npu.Stream()
        tensor = torch.zeros(1000, device="npu")
        torch.npu.synchronize()
        with torch.npu.stream(producer), gated(producer) as gate:
            tensor.fill_(value)
            transfer = own.send(tensor, 1)
            tensor.fill_(99.0)
            time.sleep(0.2)
            assert not transfer.is_completed(), "the producer has not begun, and yet the send is over"
            gate.open()
            transfer.wait()
    synchronize_and_destroy(own)


def missing_wait() -> None:
    """Without the event between the streams the receiver gets old data: the check of `order` can fail."""
    own = group()
    if RANK == 1:
        got = own.recv_new(lambda: torch.empty(1000, device="npu"), 0)
        assert got.cpu().unique().tolist() == [0.0], got
        return
    own._stream.wait_for_stream = lambda stream: None  # type: ignore[method-assign]
    producer = torch.npu.Stream()
    tensor = torch.zeros(1000, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(producer), gated(producer) as gate:
        tensor.fill_(5.0)
        own.send(tensor, 1).wait()
        gate.open()
    synchronize_and_destroy(own)


def synchronize_and_destroy(own: Group) -> None:
    torch.npu.synchronize()
    own.destroy()


# ---- faults


Kinds = type[Exception] | tuple[type[Exception], ...]


def expect_error(call: Callable[[], object], kind: Kinds, *words: str) -> str:
    """Require that the call raises ``kind`` with ``words``; return the text."""
    began = time.monotonic()
    try:
        call()
    except kind as error:
        text = str(error)
        assert all(word in text for word in words), text
        print(f"{running[-1]}, rank {RANK}: {time.monotonic() - began:.2f} s: {text}", flush=True)
        return text
    raise AssertionError(f"no {kind}")


def receive(own: Group, peer: int, count: int = 10) -> torch.Tensor:
    return own.recv_new(lambda: torch.empty(count, device="npu"), peer)


def kill_rank(victim: int, what: str) -> None:
    """Kill a rank while another one waits for it."""
    if RANK not in (0, victim):
        return
    own = Group(RANK, min(RANK, 1), 2, root_info(running[-1]), 30).connect()
    own.all_reduce(torch.ones(1, device="npu"), torch.ones(1, device="npu")).wait()
    if victim == RANK:
        await_mark("waiting")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    mark("waiting")
    data, gone = torch.ones(4 << 20, device="npu"), "is gone: its process has ended"
    if what == "send":
        expect_error(lambda: own.send(data, 1).wait(), HcclError, gone, "send of float32[4194304] to rank 1")
    elif what == "recv":
        expect_error(lambda: receive(own, 1), HcclError, gone, "receive of float32[10] from rank 1")
    else:
        expect_error(lambda: own.all_reduce(data, data).wait(), HcclError, gone, "all-reduce (sum)")
    expect_error(lambda: own.send(data, 1), HcclError, gone)
    assert own.end_reason == "has failed"
    await_unusable()
    expect_error(lambda: create_root_info(RANK), HcclError, "VRA-545", "ray.kill")


def await_unusable() -> None:
    """Wait until the end of a transfer on the device has been noticed."""
    end = time.monotonic() + 20
    while not device_error._reason:
        assert time.monotonic() < end, "the process still counts as usable"
        time.sleep(0.05)


def unseen_death() -> None:
    """Within a node HCCL does not see that a process is dead (fault unseen_death): its connection says so."""
    fault("unseen_death:rank=0")
    kill_rank(1, "recv")


def killed_in_send() -> None:
    kill_rank(1, "send")


def killed_in_recv() -> None:
    kill_rank(2, "recv")


def killed_in_collective() -> None:
    kill_rank(3, "collective")


def fault(text: str) -> None:
    """Inject a fault into the software NPU from now on."""
    if RANK == 0:
        (FOLDER / "faults").write_text(text)
        mark(f"fault {text}")
    await_mark(f"fault {text}")


def silent() -> None:
    """Rank 1 takes part in nothing (fault hccl_silent): the others end after their limit; a late send is noticed."""
    own = group(limit_s=2 if RANK == 0 else 40)
    fault("hccl_silent:rank=1")
    if RANK == 1:
        own.send(torch.ones(10, device="npu"), 0)
        await_mark("over")
        fault("")
        return
    late = torch.ones(3, device="npu")  # before the error: it stops the context
    expect_error(lambda: receive(own, 1), TransferLateError, "has not ended after 2 s", "TRANSFER_LIMIT_S")
    expect_error(lambda: own.send(late, 1), TransferLateError, "receive of float32[10] from rank 1")
    mark("over")
    fault("")


def silent_send() -> None:
    """Nobody waits for a send to a silent rank: the watchdog ends the group after the limit."""
    own = group(limit_s=1)
    fault("hccl_silent:rank=1")
    if RANK == 1:
        await_mark("over")
        fault("")
        return
    own.send(torch.ones(4 << 20, device="npu"), 1)
    began = time.monotonic()
    while own.end_reason is None:
        assert time.monotonic() - began < 60, "the watchdog has not ended it"
        time.sleep(0.05)
    expect_error(
        lambda: receive(own, 1), TransferLateError, "send of float32[4194304] to rank 1 has not ended after 1 s"
    )
    with pytest.raises(RuntimeError, match="HcclSend"):
        torch.npu.current_stream().synchronize()  # which waited for the send
    mark("over")
    fault("")


def end_in_another_thread(way: str) -> None:
    own = group(limit_s=60)
    data = torch.empty(1, device="npu")  # before the end, which stops the context
    if RANK == 1:
        expect_error(lambda: receive(own, 0), HcclError, "has destroyed its communicator", "VRA-543", "rank 0")
        return
    errors: list[str] = []
    waits = threading.Thread(target=lambda: errors.append(expect_error(lambda: receive(own, 1), TransferAbortedError)))
    waits.start()
    time.sleep(0.5)
    own.abort("enough") if way == "abort" else own.destroy()
    waits.join(20)
    assert errors, "still waiting"
    assert ("was aborted: enough" if way == "abort" else "was destroyed") in errors[0]
    own.destroy()
    expect_error(lambda: own.send(data, 1), TransferAbortedError, "Make a new communicator")


def aborted() -> None:
    end_in_another_thread("abort")


def destroyed() -> None:
    end_in_another_thread("destroy")


def held() -> None:
    """End a group while the producer of a send hangs: the send fails once the producer continues."""
    own = group(limit_s=2)
    if RANK == 1:
        expect_error(lambda: receive(own, 0), TransferLateError, "receive of float32[10] from rank 0")
        return
    producer = torch.npu.Stream()
    failed = pytest.raises(RuntimeError, match="HcclSend")  # in whatever is called next: all streams have stopped
    with failed, torch.npu.stream(producer), gated(producer) as gate:
        own.send(torch.ones(10, device="npu"), 1)
        end = time.monotonic() + 20
        while own.end_reason is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        gate.open()
        torch.npu.synchronize()


def rejected() -> None:
    """Invalid arguments are rejected before anything is sent, and the group stays usable."""
    own = group()
    one = torch.ones(2, device="npu")
    expect_error(lambda: own.send(torch.ones(2), 1 - RANK), TensorTransportError, "the tensor is on cpu", f"npu:{RANK}")
    expect_error(
        lambda: own.send(torch.ones(2, device=f"npu:{5}"), 1 - RANK), TensorTransportError, "the tensor is on npu:5"
    )
    expect_error(
        lambda: own.send(one.to(torch.complex64), 1 - RANK), TensorTransportError, "torch.complex64", "view_as_real"
    )
    expect_error(lambda: own.all_reduce(one.bool(), one.bool()), TensorTransportError, "no sum of torch.bool")
    expect_error(lambda: own.all_reduce(one, one, "avg"), TensorTransportError, "no reduction 'avg'")
    expect_error(lambda: own.all_reduce(one, one[:1].clone()), TensorTransportError, "of 2 elements")
    expect_error(lambda: own.send(one, RANK), TensorTransportError, f"its other ranks are [{1 - RANK}]")
    expect_error(lambda: own.send(one, 2), TensorTransportError)
    expect_error(lambda: own.recv(torch.ones(3, 3, device="npu").t(), 1 - RANK), TensorTransportError, "not contiguous")
    expect_error(lambda: Group(RANK, 2, 2, b""), TensorTransportError, "Invalid rank 2 of 2")
    expect_error(lambda: Group(RANK, 0, 2, b""), TensorTransportError, "4108 bytes")
    own.all_reduce(one, one).wait()
    assert one.cpu().tolist() == [2.0, 2.0]
    own.destroy()


def wrong_size() -> None:
    """Ranks that disagree about the number of ranks all get an error."""
    expect_error(lambda: group(size=2 + RANK), HcclError, "HCCL_E_PARA (1)", "ranks")


def absent() -> None:
    """Omit a rank, which never connects."""
    os.environ["SOFTNPU_CONNECT_TIMEOUT"] = "2"
    if RANK == 0:
        expect_error(group, HcclError, "HCCL_E_TIMEOUT (9)", "rank 1 did not join")
        before = free_streams()
        expect_error(group, HcclError, "HCCL_E_TIMEOUT (9)", "rank 1 did not join")
        assert free_streams() == before
    del os.environ["SOFTNPU_CONNECT_TIMEOUT"]


def free_streams() -> int:
    count = ctypes.c_uint32()
    assert runtime().aclrtGetStreamAvailableNum(ctypes.byref(count)) == 0
    return count.value


def no_memory() -> None:
    """A rank whose device has no memory for the first transfers leaves no peer waiting, and no communicator."""
    own = unconnected()
    fault(f"no_memory:device={0}")
    if RANK == 1:
        expect_error(own.connect, HcclError, "rank 0 (pid ", "has destroyed its communicator")
        return
    expect_error(own.connect, torch.OutOfMemoryError)
    expect_error(lambda: receive(own, 1), TransferAbortedError, "could not be connected: OutOfMemoryError")
    assert destroyed_in_hccl(own)


def late_first_call() -> None:
    """The first call of an operator that was not connected waits for the peers no longer than a transfer may."""
    own = unconnected(limit_s=3).connect(("send",))
    if RANK == 1:
        await_mark("over")
        return
    one = torch.ones(1, device="npu")
    expect_error(lambda: own.all_reduce(one, one), TransferLateError, "all-reduce (sum)", "has not ended after 3 s")
    mark("over")


def first_leaves() -> None:
    """Rank 0 has finished and left; of the others one is killed, for which a lower and a higher one wait."""
    own = group()
    if RANK == 0:
        own.destroy()
        mark("left")
    await_mark("left")
    if RANK == 2:
        await_mark("waiting1")
        await_mark("waiting3")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK in (1, 3):
        mark(f"waiting{RANK}")
        expect_error(lambda: receive(own, 2), HcclError, "rank 2 (pid ", "is gone: its process has ended")


def unconnected(limit_s: float = 40) -> Group:
    return Group(RANK, RANK, SIZE, root_info(running[-1]), limit_s)


def hanging_set_up() -> None:
    """End a group whose link set-up hangs, from another thread; others of the process are watched, and graphs wait."""
    own = unconnected()
    fault("link_setup:rank=0")
    if RANK == 1:
        expect_error(own.connect, HcclError, "VRA-543", "rank 0 (pid ", "has destroyed its communicator")
        return
    errors: list[str] = []
    connects = threading.Thread(target=lambda: errors.append(expect_error(own.connect, TransferAbortedError)))
    connects.start()
    time.sleep(1.5)
    own.poll()  # as the watchdog does
    began, graph = time.monotonic(), torch.npu.NPUGraph()
    aborts = threading.Timer(1, lambda: own.abort("enough"))
    aborts.start()
    with torch.npu.graph(graph):
        assert time.monotonic() - began > 0.9, "the capture did not wait"
    connects.join(20)
    aborts.join(20)  # by then the other rank is notified
    assert errors and "was aborted: enough" in errors[0], errors
    assert destroyed_in_hccl(own)
    assert not device_error._reason, "nothing was on the device"


def late_set_up() -> None:
    """Links that are not made in time end the group: the watchdog does that, while the call hangs."""
    own = unconnected()
    fault("link_setup:rank=0")
    error = TransferLateError if RANK == 0 else (TransferLateError, HcclError)
    expect_error(lambda: own.connect(limit_s=2 if RANK == 0 else 20), error)
    assert destroyed_in_hccl(own)


def in_order() -> None:
    """Ranks that begin to connect one after the other, the last one first, all meet; no link is made later."""
    own = unconnected()
    if RANK < SIZE - 1:
        await_mark(f"connecting {RANK + 1}")
    mark(f"connecting {RANK}")
    own.connect()
    mark(f"connected {RANK}")
    for rank in range(SIZE):
        await_mark(f"connected {rank}")
    fault("link_setup:code=19")  # whoever makes a link now fails
    for peer in (rank for rank in range(SIZE) if rank != RANK):
        if peer > RANK:
            own.send(torch.full((3,), float(RANK), device="npu"), peer).wait()
        else:
            assert receive(own, peer, 3).cpu().tolist() == [float(peer)] * 3
    total = torch.ones(1, device="npu")
    own.all_reduce(total, total).wait()
    assert total.item() == SIZE
    mark(f"over {RANK}")
    for rank in range(SIZE):
        await_mark(f"over {rank}")
    own.destroy()


def late_rank() -> None:
    """A rank that does not connect is named by those that wait for it, within their limit."""
    own, last = unconnected(), SIZE - 1
    first = f"VRA-548: {own.name}: not all ranks have made their links in time: send of float32[1] to rank {last}"
    if RANK == 0:
        expect_error(lambda: own.connect(limit_s=3), TransferLateError, first)
    elif last != RANK:
        expect_error(own.connect, HcclError, "VRA-543", "rank 0 (pid ", "has destroyed its communicator")
    mark(f"over {RANK}")
    for rank in range(SIZE):
        await_mark(f"over {rank}")
    own.destroy()
    assert destroyed_in_hccl(own)


def failed_call() -> None:
    """A call of HCCL that fails ends the group, and leaves no event."""
    own = unconnected()
    fault("link_setup:rank=0,code=19")
    if RANK == 0:
        data = torch.ones(4, device="npu")
        expect_error(lambda: own.send(data, 1), HcclError, "HCCL_E_NETWORK (19)", "send of float32[4] to rank 1")
        assert own.end_reason == "has failed"
        expect_error(lambda: own.send(data, 1), HcclError, "HCCL_E_NETWORK (19)")
    else:
        expect_error(lambda: receive(own, 0), HcclError, "VRA-543", "rank 0 (pid ")
    assert destroyed_in_hccl(own)
    end = time.monotonic() + 20
    while own._pending:
        assert time.monotonic() < end, "events are left"
        time.sleep(0.05)


def destroyed_in_hccl(own: Group) -> bool:
    """Return whether HCCL no longer knows the communicator, within some seconds."""
    unknown, hccl, size = 6, ctypes.CDLL("libhccl.so"), ctypes.c_uint32()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if hccl.HcclGetRankSize(ctypes.c_void_p(own._comm), ctypes.byref(size)) == unknown:
            return True
        time.sleep(0.05)
    return False


def destroy_again() -> None:
    """HCCL says that the communicator is in use."""
    own = group()
    fault("destroy_again:nth=1")
    own.destroy()
    assert destroyed_in_hccl(own)
    mark(f"destroyed {RANK}")
    await_mark("destroyed 0")
    await_mark("destroyed 1")


def twice_to_one() -> None:
    """Exchange several tensors with one peer, which HCCL refuses in one batch."""
    own = group()
    sends = [torch.full((3 + n,), float(10 * RANK + n), device="npu") for n in range(3 - RANK)]
    recvs = [torch.empty(3 + n, device="npu") for n in range(2 + RANK)]
    own.exchange([(each, 1 - RANK) for each in sends], [(each, 1 - RANK) for each in recvs]).wait()
    assert [each.unique().tolist() for each in recvs] == [[10.0 * (1 - RANK) + n] for n in range(2 + RANK)]
    own.destroy()


def captured() -> None:
    """While a graph is captured no thread sends or receives, and the capture is not disturbed."""
    own = group()
    data = torch.ones(4, device="npu")
    torch.npu.synchronize()
    if RANK == 1:
        await_mark("captured")
        own.send(data, 0).wait()
        own.destroy()
        return
    errors: list[str] = []
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        data.add_(1)
        errors.append(expect_error(lambda: own.send(data, 1), CaptureError, "while a graph is captured"))
        other_thread = threading.Thread(
            target=lambda: errors.append(expect_error(lambda: receive(own, 1, 4), CaptureError))
        )
        other_thread.start()
        other_thread.join()
    assert len(errors) == 2
    mark("captured")
    assert receive(own, 1, 4).cpu().tolist() == [1.0] * 4
    graph.replay()
    torch.npu.synchronize()
    assert data.cpu().tolist() == [2.0] * 4
    own.destroy()


def copied() -> None:
    """Ray's communicator sends copies, of which a send that is refused makes none."""
    from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator

    own = group()
    communicator = HcclCommunicator(SIZE, "", None, [None] * SIZE)
    communicator._group = own
    data = torch.arange(12.0).reshape(3, 4).npu()
    if RANK == 1:
        await_mark("sent")
        for expected in (data, data.t()):
            received = communicator.recv(tuple(expected.shape), expected.dtype, 0)
            assert torch.equal(received.cpu(), expected.cpu())
        assert communicator.recv((5000,), torch.float32, 0).cpu().eq(7).all(), "overwritten before it was copied"
        own.destroy()
        return
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        data.add_(0)
        made = torch.npu.memory_stats()["allocation.all.allocated"]
        expect_error(lambda: communicator.send(data, 1), CaptureError, "while a graph is captured")
        expect_error(lambda: communicator.send(data, 0), TensorTransportError, "its other ranks are [1]")
        assert torch.npu.memory_stats()["allocation.all.allocated"] == made, "a copy was made"
    for value in (data, data.t()):
        communicator.send(value, 1)
    data.zero_()  # which does not wait for the peer
    torch.npu.current_stream().synchronize()
    side, value = torch.npu.Stream(), torch.full((5000,), 7.0, device="npu")
    torch.npu.current_stream().synchronize()
    with gated(side):
        with torch.npu.stream(side):  # which has not allocated the tensor, as Ray's stream for overlap has not
            communicator.send(value, 1)
        del value
        assert not torch.zeros(5000, device="npu").any(), "in the memory of the tensor, where it is free"
    communicator.send(data[:0], 1)  # of which nothing is sent
    when_sent, last = communicator.when_sent(), communicator._last_send
    assert when_sent is not None and last is not None
    assert not last.is_completed(), "nobody has received, and yet all is sent"
    mark("sent")
    when_sent()
    own.destroy()


def run_scenario(scenario: str) -> None:
    """Run it, and write its result to a file."""
    running.append(scenario)
    try:
        globals()[scenario]()
        result = "passed"
    except BaseException:  # noqa: BLE001  reported by the test
        result = traceback.format_exc()
    if RANK == 0 and os.environ.get("SOFTNPU_FAULTS"):
        (FOLDER / "faults").write_text("")
    (FOLDER / f"{scenario}.rank{RANK}").write_text(result)


def main(scenarios: list[str]) -> None:
    """Run them one after the other, each in a fork: a device error is the end of its process, and imports are slow."""
    for scenario in scenarios:
        child = os.fork()
        if not child:
            run_scenario(scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):  # a rank that is killed takes part in no later scenario
            os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1].split(","))
