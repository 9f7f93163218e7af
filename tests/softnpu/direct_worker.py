"""One process of a test of the direct transport's links, without Ray: rank 0 has objects, the others want them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ray_ascend.accelerators.choose import accelerator
from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.lifecycle.messages import Address
from vllm_ray_ascend.settings import Settings
from vllm_ray_ascend.transport.direct.place import Here
from vllm_ray_ascend.transport.direct.sink import Origin, Sink
from vllm_ray_ascend.transport.direct.source import Source

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
"""Of the scenario that runs: several run one after the other, for the start of a process takes long."""
DEVICE = RANK + 1
MIXED: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((3, 5), torch.float32),
    ((0, 7), torch.float16),
    ((), torch.int64),
    ((1 << 20,), torch.bfloat16),
    ((9,), torch.bool),
    ((33,), torch.float8_e4m3fn),
]


def process(limit_s: float = 60.0, idle_s: float = 0.0, device: int = DEVICE) -> Here:
    settings = Settings(direct_idle_s=idle_s)
    return Here(accelerator("npu"), settings, "127.0.0.1", "the-node", f"rank {RANK}", limit_s, device)


def mark(name: str, text: str = "") -> None:
    path = FOLDER / name
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").rename(path)


def await_mark(name: str) -> str:
    while not (path := FOLDER / name).exists():
        time.sleep(0.005)
    return path.read_text()


def offer(source: Source, device: int = DEVICE) -> None:
    address = source.address
    mark("origin", json.dumps([address.host, address.port, address.token, device]))


def origin() -> Origin:
    host, port, token, device = json.loads(await_mark("origin"))
    return Origin(Address(host, port, token), device)


def made(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The same in every process, with bytes of every value."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (count,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: numbers that are none are equal too."""
    whole = got.cpu().contiguous().reshape(-1)
    wanted = expected.contiguous().reshape(-1).view(torch.uint8)
    return got.shape == expected.shape and bool(torch.equal(whole.view(torch.uint8), wanted))


def received(
    sink: Sink, name: str, where: Origin, metas: list[tuple[tuple[int, ...], torch.dtype]] = MIXED
) -> list[torch.Tensor]:
    """An object, in tensors that hold something else before."""
    torch.npu.set_device(DEVICE)

    def make() -> list[torch.Tensor]:
        return [torch.ones(shape, dtype=torch.uint8, device=f"npu:{DEVICE}").to(dtype) for shape, dtype in metas]

    return sink.receive(name, where, DEVICE, make)


def check(got: list[torch.Tensor], seed: int = 0) -> None:
    for number, (tensor, (shape, dtype)) in enumerate(zip(got, MIXED, strict=True)):
        assert same(tensor, made(seed + number, shape, dtype)), (number, shape, dtype)


def keep_mixed(source: Source, name: str, seed: int = 0) -> None:
    torch.npu.set_device(DEVICE)
    source.keep(name, [made(seed + n, *meta).npu() for n, meta in enumerate(MIXED)], DEVICE)


def basic() -> None:
    """Tensors of all kinds, over one communicator, not contiguous, of another device, freed, to two at once."""
    if RANK == 0:
        source = Source(process())
        keep_mixed(source, "mixed")
        wide = made(77, (64, 32), torch.float32).npu()
        source.keep("turned", [wide.t()], DEVICE)
        other = made(78, (5,), torch.float32).to("npu:7")
        source.keep("other", [other], 7)
        offer(source)
        for rank in range(1, SIZE):
            await_mark(f"done{rank}")
        return
    sink, where = Sink(process()), origin()
    for _ in range(3):
        check(received(sink, "mixed", where))
    assert len(sink._links) == 1
    turned = received(sink, "turned", where, [((32, 64), torch.float32)])
    assert same(turned[0], made(77, (64, 32), torch.float32).t())
    other = received(sink, "other", Origin(where.address, 7), [((5,), torch.float32)])
    assert same(other[0], made(78, (5,), torch.float32))
    with pytest.raises(DirectTransportError, match="no longer has object freed"):
        received(sink, "freed", where)
    check(received(sink, "mixed", where))  # the link has survived that
    sink.release()
    check(received(sink, "mixed", where))
    with pytest.raises(DirectTransportError, match="are both on NPU"):
        received(Sink(process()), "other", Origin(where.address, DEVICE))
    mark(f"done{RANK}")


def at_once() -> None:
    """Two processes send to each other, each with a busy main thread, and receive in several threads."""
    source = Source(process())
    for number in range(6):
        keep_mixed(source, f"object{number}", seed=100 * RANK + number)
    address = source.address
    mark(f"origin{RANK}", json.dumps([address.host, address.port, address.token, DEVICE]))
    host, port, token, device = json.loads(await_mark(f"origin{1 - RANK}"))
    sink, where, failures = Sink(process()), Origin(Address(host, port, token), device), []

    def receive(number: int) -> None:
        try:
            check(received(sink, f"object{number}", where), 100 * (1 - RANK) + number)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    mark(f"done{RANK}")
    await_mark(f"done{1 - RANK}")


def producer_is_waited_for() -> None:
    """What the producing stream has yet to write is sent as it will be."""
    size = 1 << 22
    if RANK == 0:
        source = Source(process())
        torch.npu.set_device(DEVICE)
        tensor = torch.zeros(size, device=f"npu:{DEVICE}")
        for _ in range(20):
            tensor += 1
        source.keep("sum", [tensor], DEVICE)
        assert not source._kept["sum"].ready.query(), "the producer is too fast for this test to show anything"
        offer(source)
        await_mark("done1")
        return
    got = received(Sink(process()), "sum", origin(), [((size,), torch.float32)])
    assert bool((got[0] == 20).all())
    mark("done1")


def later(call: Callable[[], Any], seconds: float = 0) -> None:
    """In another thread."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def raised(call: Callable[[], Any], match: str) -> float:
    began = time.monotonic()
    with pytest.raises(DirectTransportError, match=match):
        call()
    return time.monotonic() - began


def sender_killed() -> None:
    """A sender that dies in a transfer: the receiver is told who, and goes on with another object from another."""
    if RANK == 0:
        source = Source(process())
        keep_mixed(source, "mixed")
        source._kept["mixed"] = source._kept["mixed"]._replace(ready=_Never())
        offer(source)
        await_mark("asked")
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 2:
        await_mark("done1")
        source = Source(process())
        keep_mixed(source, "mixed")
        address = source.address
        mark("second", json.dumps([address.host, address.port, address.token, DEVICE]))
        await_mark("done2")
        return
    sink, where = Sink(process()), origin()
    raised(lambda: received(sink, "mixed", where), r"rank 0 is gone, while its producer was at work")
    raised(lambda: received(sink, "mixed", where), r"has ended \(.*refused.*\)\. Produce the object anew")
    mark("done1")
    host, port, token, device = json.loads(await_mark("second"))
    check(received(sink, "mixed", Origin(Address(host, port, token), device)))
    mark("done2")


def die() -> None:
    await_mark("begun")
    os.kill(os.getpid(), signal.SIGKILL)


def killed_on_the_way() -> None:
    """One side dies while the tensor is on its way (``VICTIM``); the other is told, and is of use afterwards."""
    victim, big = int(os.environ["VICTIM"]), 96 << 20
    if victim == RANK:
        later(die)
    if RANK == 0:
        source = Source(process())
        torch.npu.set_device(DEVICE)
        source.keep("big", [torch.zeros(big, dtype=torch.uint8, device=f"npu:{DEVICE}")] * 200, DEVICE)
        offer(source)
        if victim == 1:
            await_mark("begun")
            end = time.monotonic() + 30
            while source._links and time.monotonic() < end:
                time.sleep(0.05)
            assert not source._links, "the sender still serves a receiver that is dead"
            assert float(torch.ones(8, device=f"npu:{DEVICE}").sum()) == 8
            return
        time.sleep(120)
    where = origin()
    one = torch.empty(big, dtype=torch.uint8, device=f"npu:{DEVICE}")
    sink = Sink(process())
    later(lambda: mark("begun"), 1)
    raised(lambda: sink.receive("big", where, DEVICE, lambda: [one] * 200), r"rank 0 .*(is gone|gave up)")
    assert float(torch.ones(8, device=f"npu:{DEVICE}").sum()) == 8


def silent() -> None:
    """A sender that takes no part in HCCL any more (SOFTNPU_FAULTS): both end at their limit, and say what mends it."""
    if RANK == 0:
        source = Source(process(limit_s=4.0))
        keep_mixed(source, "mixed")
        offer(source)
        await_mark("done1")
        assert float(torch.ones(8, device=f"npu:{DEVICE}").sum()) == 8
        return
    sink = Sink(process(limit_s=3.0))
    where = origin()
    spent = raised(lambda: received(sink, "mixed", where), "(?s)was silent for 3 s|has not ended after")
    assert spent >= 1.0
    assert float(torch.ones(8, device=f"npu:{DEVICE}").sum()) == 8
    mark("done1")


def aborted() -> None:
    """An abort from another thread ends both sides at once; the next object comes."""
    if RANK == 0:
        source = Source(process())
        keep_mixed(source, "mixed")
        source.keep("stuck", [torch.zeros(8, device=f"npu:{DEVICE}")], DEVICE)
        source._kept["stuck"] = source._kept["stuck"]._replace(ready=_Never())
        offer(source)
        await_mark("done1")
        return
    sink, where = Sink(process()), origin()
    check(received(sink, "mixed", where))
    later(lambda: sink.abort("stuck", "no longer wanted"), 0.5)
    spent = raised(lambda: received(sink, "stuck", where), "no longer wanted")
    assert spent < 30
    sink.abort("later", "not wanted at all")
    raised(lambda: received(sink, "later", where), "not wanted at all")
    check(received(sink, "mixed", where))
    mark("done1")


class _Never:
    """An event of a producer that is at work for good."""

    def query(self) -> bool:
        mark("asked")
        return False


def idle() -> None:
    """A link without work is given back by its sender, and made again when it is needed."""
    if RANK == 0:
        source = Source(process(idle_s=0.5))
        keep_mixed(source, "mixed")
        offer(source)
        await_mark("used")
        while source._links:
            time.sleep(0.05)
        mark("idle")
        await_mark("done1")
        return
    sink, where = Sink(process()), origin()
    for _ in range(2):
        check(received(sink, "mixed", where))
        mark("used")
        await_mark("idle")
    mark("done1")


def stranger() -> None:
    """Who does not know the word is not served, nor who sends what is no message."""
    if RANK == 0:
        source = Source(process())
        keep_mixed(source, "mixed")
        offer(source)
        await_mark("done1")
        return
    where, sink = origin(), Sink(process(limit_s=10.0))
    wrong = where.address.__class__(where.address.host, where.address.port, "0" * 32)
    raised(lambda: received(sink, "mixed", Origin(wrong, where.device)), "is gone, while the two processes conn")
    mark("done1")


def main(scenarios: str) -> None:
    """Run them one after the other, each with a folder of its own."""
    global FOLDER
    for name in scenarios.split(","):
        FOLDER = Path(os.environ["TEST_FOLDER"]) / name
        FOLDER.mkdir(exist_ok=True)
        print(name, flush=True)
        globals()[name]()


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)
