"""One rank of a test of transport.hccl's Group, on the real torch_npu. A scenario is a function."""

from __future__ import annotations

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

import torch

from tests.softnpu.device import gated
from vllm_ray_ascend.errors import (
    CaptureError,
    HcclError,
    TensorTransportError,
    TransferAbortedError,
    TransferLateError,
)
from vllm_ray_ascend.transport.hccl.group import Group, new_root

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
running: list[str] = []
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def root(scenario: str) -> bytes:
    """Of rank 0, handed to the others through a file."""
    path = FOLDER / f"{scenario}.root"
    if RANK == 0:
        path.with_suffix(".partial").write_bytes(new_root(RANK))
        path.with_suffix(".partial").rename(path)
    await_file(path)
    return path.read_bytes()


def group(size: int = SIZE, limit_s: float | None = 40) -> Group:
    return Group(RANK, RANK, size, root(running[-1]), limit_s)


def mark(name: str) -> None:
    (FOLDER / f"{running[-1]}.{name}").touch()


def await_mark(name: str) -> None:
    await_file(FOLDER / f"{running[-1]}.{name}")


def await_file(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path}"
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
    own._lane.after = lambda stream: None  # type: ignore[method-assign]
    producer = torch.npu.Stream()
    tensor = torch.zeros(1000, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(producer), gated(producer) as gate:
        tensor.fill_(5.0)
        own.send(tensor, 1).wait()
        gate.open()
    await_done(own)


def await_done(own: Group) -> None:
    torch.npu.synchronize()
    own.destroy()


# ---- faults


Kinds = type[Exception] | tuple[type[Exception], ...]


def ends(call: Callable[[], object], kind: Kinds, *words: str) -> str:
    """The call must raise ``kind`` with ``words``."""
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


def killed_in(victim: int, what: str) -> None:
    """A rank is killed while another one waits for it."""
    if RANK not in (0, victim):
        return
    own = Group(RANK, min(RANK, 1), 2, root(running[-1]), 30)
    own.all_reduce(torch.ones(1, device="npu"), torch.ones(1, device="npu")).wait()
    if victim == RANK:
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
    assert float(data[:5].sum().cpu()) > 0, "the caller's stream goes on"
    torch.npu.synchronize()  # the stream that has failed is gone


def killed_in_send() -> None:
    killed_in(1, "send")


def killed_in_recv() -> None:
    killed_in(2, "recv")


def killed_in_collective() -> None:
    killed_in(3, "collective")


def fault(text: str) -> None:
    """From now on the software NPU has this fault."""
    if RANK == 0:
        (FOLDER / "faults").write_text(text)
        mark(f"fault {text}")
    await_mark(f"fault {text}")


def silent() -> None:
    """Rank 1 takes part in nothing (fault hccl_silent): the others give up after their limit; sends are noticed too."""
    own = group(limit_s=2 if RANK == 0 else 40)
    fault("hccl_silent:rank=1")
    if RANK == 1:
        own.send(torch.ones(10, device="npu"), 0)
        await_mark("over")
        fault("")
        return
    ends(lambda: receive(own, 1), TransferLateError, "has not ended after 2 s", "TRANSFER_LIMIT_S")
    ends(lambda: own.send(torch.ones(3, device="npu"), 1), TransferLateError, "receive of float32[10] from rank 1")
    mark("over")
    fault("")


def silent_send() -> None:
    """Nobody waits for a send to a silent rank: the group ends after the limit all the same."""
    own = group(limit_s=1)
    fault("hccl_silent:rank=1")
    if RANK == 1:
        await_mark("over")
        fault("")
        return
    own.send(torch.ones(4 << 20, device="npu"), 1)
    began = time.monotonic()
    while own.ended is None:
        assert time.monotonic() - began < 60, "nobody has ended it"
        time.sleep(0.05)
    ends(lambda: receive(own, 1), TransferLateError, "send of float32[4194304] to rank 1 has not ended after 1 s")
    torch.npu.current_stream().synchronize()  # which waited for the send
    mark("over")
    fault("")


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
    torch.npu.synchronize()  # the stream that has failed is gone


def aborted() -> None:
    ended_by_another_thread("abort")


def destroyed() -> None:
    ended_by_another_thread("destroy")


def held() -> None:
    """A send whose producer hangs when its group ends: its stream goes once the producer goes on, and no sooner."""
    own = group(limit_s=2)
    if RANK == 1:
        ends(lambda: receive(own, 0), TransferLateError, "receive of float32[10] from rank 0")
        return
    producer = torch.npu.Stream()
    with torch.npu.stream(producer), gated(producer) as gate:
        own.send(torch.ones(10, device="npu"), 1)
        end = time.monotonic() + 20
        while own.ended is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        gate.open()
        while True:
            try:
                torch.npu.synchronize()
                break
            except RuntimeError:
                assert time.monotonic() < end
                time.sleep(0.1)
    assert float(torch.ones(3, device="npu").sum()) == 3.0


def refused() -> None:
    """What cannot be is refused before anything is sent, and the group goes on."""
    own = group()
    one = torch.ones(2, device="npu")
    ends(lambda: own.send(torch.ones(2), 1 - RANK), TensorTransportError, "the tensor is on cpu", f"npu:{RANK}")
    ends(lambda: own.send(torch.ones(2, device=f"npu:{5}"), 1 - RANK), TensorTransportError, "the tensor is on npu:5")
    ends(lambda: own.send(one.to(torch.complex64), 1 - RANK), TensorTransportError, "torch.complex64", "view_as_real")
    ends(lambda: own.all_reduce(one.bool(), one.bool()), TensorTransportError, "no sum of torch.bool")
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
    os.environ["HCCL_CONNECT_TIMEOUT"] = "2"
    if RANK == 0:
        ends(group, HcclError, "HCCL_E_TIMEOUT (9)", "rank 1 did not join")
    del os.environ["HCCL_CONNECT_TIMEOUT"]


def captured() -> None:
    """While a graph is captured nothing is sent or received, by no thread, and the capture is none the worse for it."""
    own = group()
    data = torch.ones(4, device="npu")
    torch.npu.synchronize()
    if RANK == 1:
        await_mark("captured")
        own.send(data, 0).wait()
        own.destroy()
        return
    said: list[str] = []
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        data.add_(1)
        refused_here = ends(lambda: own.send(data, 1), CaptureError, "while a graph is captured")
        tries = threading.Thread(target=lambda: said.append(ends(lambda: receive(own, 1, 4), CaptureError)))
        tries.start()
        tries.join()
    assert refused_here and said
    mark("captured")
    assert receive(own, 1, 4).cpu().tolist() == [1.0] * 4
    graph.replay()
    torch.npu.synchronize()
    assert data.cpu().tolist() == [2.0] * 4
    own.destroy()


def main(scenarios: list[str]) -> None:
    """Runs them one after the other, and leaves what became of each in a file."""
    for scenario in scenarios:
        running.append(scenario)
        try:
            globals()[scenario]()
            said = "passed"
        except BaseException:  # noqa: BLE001  told by the test
            said = traceback.format_exc()
        (FOLDER / f"{scenario}.rank{RANK}").write_text(said)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1].split(","))
