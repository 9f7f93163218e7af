"""One rank of a test of transport.hccl's Group, on the real torch_npu. A scenario is a function."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from vllm_ray_ascend.transport.hccl.group import Group, new_root

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def root(name: str = "root") -> bytes:
    """Of rank 0, handed to the others through a file."""
    path = FOLDER / name
    if RANK == 0:
        path.with_suffix(".partial").write_bytes(new_root(RANK))
        path.with_suffix(".partial").rename(path)
    while not path.exists():
        time.sleep(0.005)
    return path.read_bytes()


def group(name: str = "root", size: int = SIZE, limit_s: float | None = None) -> Group:
    return Group(RANK, RANK, size, root(name), limit_s)


def mark(name: str) -> None:
    (FOLDER / f"{name}.mark").touch()


def await_mark(name: str) -> None:
    while not (FOLDER / f"{name}.mark").exists():
        time.sleep(0.005)


def made(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The same on every rank, with bytes of every value."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for each in shape:
        count *= each
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (count * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: numbers that are none are equal too."""
    return bool(torch.equal(got.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)))


def basic() -> None:
    """Types and shapes between neighbours in a ring, and all collectives."""
    own = group()
    following, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for seed, dtype in enumerate(TYPES):
        for shape in ((5,), (0,), (3, 0, 2), (17, 33), (1,)):
            mine, theirs = (made(100 * rank + seed, shape, dtype) for rank in (RANK, before))
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
    word = torch.full((4,), float(RANK), device="npu")
    own.broadcast(word, SIZE - 1).wait()
    assert word.cpu().tolist() == [SIZE - 1.0] * 4
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
            got = own.recv_new(lambda size=size, dtype=dtype: torch.empty(size, dtype=dtype, device="npu"), sender)  # type: ignore[misc]
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
    """A send comes after its producer and before later writes; a receive is complete when it returns."""
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
            assert not transfer.done(), "the producer has not begun, and yet the send is over"
            gate.open()
            transfer.wait()
    await_done(own)


def missing_wait() -> None:
    """Without the event between the streams the receiver gets old data: the check of `order` can fail."""
    own = group()
    if RANK == 1:
        got = own.recv_new(lambda: torch.empty(1000, device="npu"), 0)
        assert got.cpu().unique().tolist() == [0.0], got
        return
    own.stream.wait_stream = lambda stream: None
    producer = torch.npu.Stream()
    tensor = torch.zeros(1000, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(producer), gated(producer) as gate:
        tensor.fill_(5.0)
        own.send(tensor, 1).wait()
        gate.open()
    await_done(own)


def task_queue() -> None:
    """Asking for the bare stream hands over what torch_npu's queue holds: 300 times it has, without it it need not."""
    own = group()
    handed = 0
    for _ in range(300):
        event = torch.npu.Event()
        event.record(own.stream)
        _ = own.stream.npu_stream
        handed += event.query()
    assert handed == 300, handed
    own.destroy()


def await_done(own: Group) -> None:
    torch.npu.synchronize()
    own.destroy()


# ---- faults


def ends(call: object, kind: type[Exception], *words: str, within: float = 20) -> str:
    """The call must raise ``kind`` with ``words``, and soon."""
    began = time.monotonic()
    try:
        call()  # type: ignore[operator]
    except kind as error:
        text = str(error)
        assert all(word in text for word in words), text
        assert time.monotonic() - began < within, time.monotonic() - began
        print(f"{time.monotonic() - began:.2f} s: {text}", flush=True)
        return text
    raise AssertionError(f"no {kind.__name__}")


def receive(own: Group, peer: int, count: int = 10) -> torch.Tensor:
    return own.recv_new(lambda: torch.empty(count, device="npu"), peer)


def killed_in(what: str) -> None:
    """Rank 1 is killed while the others wait for it."""
    own = group(limit_s=30)
    own.all_reduce(torch.ones(1, device="npu"), torch.ones(1, device="npu")).wait()
    if RANK == 1:
        await_mark("waiting")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    mark("waiting")
    data = torch.ones(4 << 20, device="npu")
    if what == "send":
        ends(lambda: own.send(data, 1).wait(), HcclError, "HCCL_E_REMOTE (21)", "send of float32[4194304] to rank 1")
    elif what == "recv":
        ends(lambda: receive(own, 1), HcclError, "HCCL_E_REMOTE (21)", "receive of float32[10] from rank 1", "is gone")
    else:
        ends(lambda: own.all_reduce(data, data).wait(), HcclError, "HCCL_E_REMOTE (21)", "all-reduce (sum)")
    ends(lambda: own.send(data, 1), HcclError, "HCCL_E_REMOTE (21)")
    assert own.ended == "has failed"
    assert float(data.sum().cpu()) > 0, "the caller's stream goes on"


def killed_in_send() -> None:
    killed_in("send")


def killed_in_recv() -> None:
    killed_in("recv")


def killed_in_collective() -> None:
    killed_in("collective")


def silent() -> None:
    """Rank 1 takes part in nothing (fault hccl_silent): the others give up after their limit; sends are noticed too."""
    own = group(limit_s=2)
    if RANK == 1:
        ends(lambda: receive(own, 0), (TransferLateError, HcclError))  # type: ignore[arg-type]
        return
    ends(lambda: receive(own, 1), TransferLateError, "has not ended after 2 s", "TRANSFER_LIMIT_S", within=5)
    ends(lambda: own.send(torch.ones(3, device="npu"), 1), TransferLateError, "receive of float32[10] from rank 1")


def silent_send() -> None:
    """Nobody waits for a send to a silent rank: the group ends after the limit all the same."""
    own = group(limit_s=1)
    if RANK == 1:
        await_mark("over")
        return
    own.send(torch.ones(4 << 20, device="npu"), 1)
    began = time.monotonic()
    while own.ended is None:
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    ends(lambda: receive(own, 1), TransferLateError, "send of float32[4194304] to rank 1 has not ended after 1 s")
    torch.npu.current_stream().synchronize()  # which waited for the send
    mark("over")


def ended_by_another_thread(way: str) -> None:
    own = group(limit_s=60)
    if RANK == 1:
        ends(lambda: receive(own, 0), HcclError, "has destroyed its communicator", "HCCL_E_REMOTE (21)")
        return
    said: list[str] = []
    waits = threading.Thread(target=lambda: said.append(ends(lambda: receive(own, 1), TransferAbortedError)))
    waits.start()
    time.sleep(0.5)
    own.abort("enough") if way == "abort" else own.destroy()
    waits.join(20)
    assert said, "still waiting"
    assert ("was aborted: enough" if way == "abort" else "was destroyed") in said[0]
    own.destroy()
    ends(lambda: own.send(torch.ones(1, device="npu"), 1), TransferAbortedError, "Make a new communicator")


def aborted() -> None:
    ended_by_another_thread("abort")


def destroyed() -> None:
    ended_by_another_thread("destroy")


def refused() -> None:
    """What cannot be is refused before anything is sent, and the group goes on."""
    own = group()
    one = torch.ones(2, device="npu")
    ends(lambda: own.send(torch.ones(2), 1 - RANK), TensorTransportError, "the tensor is on cpu", f"npu:{RANK}")
    ends(lambda: own.send(torch.ones(2, device=f"npu:{5}"), 1 - RANK), TensorTransportError, "the tensor is on npu:5")
    ends(lambda: own.send(one.to(torch.complex64), 1 - RANK), TensorTransportError, "torch.complex64", "view_as_real")
    ends(lambda: own.all_reduce(one.double(), one.double()), TensorTransportError, "no sum of torch.float64")
    ends(lambda: own.all_reduce(one, one, "avg"), TensorTransportError, "no reduction 'avg'")
    ends(lambda: own.all_reduce(one, one[:1].clone()), TensorTransportError, "of 2 elements")
    ends(lambda: own.send(one, RANK), TensorTransportError, f"its other ranks are [{1 - RANK}]")
    ends(lambda: own.send(one, 2), TensorTransportError)
    ends(lambda: own.recv(torch.ones(3, 3, device="npu").t(), 1 - RANK), TensorTransportError, "not contiguous")
    ends(lambda: Group(RANK, 2, 2, b""), TensorTransportError, "Rank 2 of 2")
    ends(lambda: Group(RANK, 0, 2, b""), TensorTransportError, "4108 bytes")
    own.all_reduce(one, one).wait()
    assert one.cpu().tolist() == [2.0, 2.0]
    own.destroy()


def wrong_size() -> None:
    """Ranks that disagree about their number all learn so."""
    ends(lambda: group(size=2 + RANK), HcclError, "HCCL_E_PARA (1)", "ranks")


def absent() -> None:
    """A rank that never comes."""
    ends(group, HcclError, "HCCL_E_TIMEOUT (9)", "rank 1 did not join")


def captured() -> None:
    """While another thread captures a graph nothing is sent; a receive that waits is not in the capture's way."""
    own = group(limit_s=30)
    data = torch.ones(4, device="npu")
    torch.npu.synchronize()
    if RANK == 1:
        await_mark("captured")
        own.send(data, 0).wait()
        own.destroy()
        return
    got: list[torch.Tensor] = []
    waits = threading.Thread(target=lambda: got.append(receive(own, 1, 4)))
    waits.start()
    time.sleep(0.3)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        data.add_(1)
        ends(lambda: own.send(data, 1), CaptureError, "while a graph is captured")
        time.sleep(0.3)
    mark("captured")
    waits.join(30)
    assert got[0].cpu().tolist() == [1.0] * 4
    graph.replay()
    torch.npu.synchronize()
    assert data.cpu().tolist() == [2.0] * 4
    own.destroy()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
