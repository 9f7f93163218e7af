"""One process of a test of the direct transport's links, without Ray: rank 0 has objects, the others request them."""

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

from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.errors import DirectTransportError, HcclError
from vllm_ray_ascend.hccl import device_error
from vllm_ray_ascend.ipc.sockets import Address, connect
from vllm_ray_ascend.ray_transport.direct.local_endpoint import LocalEndpoint
from vllm_ray_ascend.ray_transport.direct.receiver import Origin, Receiver
from vllm_ray_ascend.ray_transport.direct.sender import Sender
from vllm_ray_ascend.settings import Settings

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
"""Of the present scenario: several run one after the other, as starting a process takes long."""
DEVICE = RANK + 1
MIXED: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((3, 5), torch.float32),
    ((0, 7), torch.float16),
    ((), torch.int64),
    ((1 << 20,), torch.bfloat16),
    ((9,), torch.bool),
    ((33,), torch.float8_e4m3fn),
]
LARGE = ((1 << 24,), torch.float32)


def create_endpoint(limit_s: float = 60.0, idle_s: float = 0.0, device: int = DEVICE) -> LocalEndpoint:
    settings = Settings(direct_idle_s=idle_s)
    return LocalEndpoint(get_accelerator("npu"), settings, "127.0.0.1", "the-node", f"rank {RANK}", limit_s, device)


def mark(name: str, text: str = "") -> None:
    path = FOLDER / name
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").rename(path)


def await_mark(name: str) -> str:
    while not (path := FOLDER / name).exists():
        time.sleep(0.005)
    return path.read_text()


def publish_origin(sender: Sender, device: int = DEVICE) -> None:
    address = sender.address
    mark("origin", json.dumps([address.host, address.port, address.token, device]))


def await_origin() -> Origin:
    host, port, token, device = json.loads(await_mark("origin"))
    return Origin(Address(host, port, token), device)


def make_tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the same tensor in every process, with bytes of every value."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (count,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit: NaNs are equal too."""
    whole = got.cpu().contiguous().reshape(-1)
    wanted = expected.contiguous().reshape(-1).view(torch.uint8)
    return got.shape == expected.shape and bool(torch.equal(whole.view(torch.uint8), wanted))


def receive_object(
    receiver: Receiver, name: str, where: Origin, metas: list[tuple[tuple[int, ...], torch.dtype]] = MIXED
) -> list[torch.Tensor]:
    """Receive an object into tensors that hold other values before."""
    torch.npu.set_device(DEVICE)

    def allocate() -> list[torch.Tensor]:
        return [torch.ones(shape, dtype=torch.uint8, device=f"npu:{DEVICE}").to(dtype) for shape, dtype in metas]

    return receiver.receive_object(name, where, DEVICE, allocate)


def check(got: list[torch.Tensor], seed: int = 0) -> None:
    for number, (tensor, (shape, dtype)) in enumerate(zip(got, MIXED, strict=True)):
        assert same(tensor, make_tensor(seed + number, shape, dtype)), (number, shape, dtype)


def keep_mixed(sender: Sender, name: str, seed: int = 0) -> None:
    torch.npu.set_device(DEVICE)
    sender.keep_object(name, [make_tensor(seed + n, *meta).npu() for n, meta in enumerate(MIXED)], DEVICE)


def basic() -> None:
    """Tensors of all kinds, over one communicator, not contiguous, of another device, freed, to two at once."""
    if RANK == 0:
        sender = Sender(create_endpoint())
        keep_mixed(sender, "mixed")
        wide = make_tensor(77, (64, 32), torch.float32).npu()
        sender.keep_object("turned", [wide.t()], DEVICE)
        sender.keep_object("empty_last", [make_tensor(79, *LARGE).npu(), torch.empty(0, 7).npu()], DEVICE)
        other = make_tensor(78, (5,), torch.float32).to("npu:7")
        sender.keep_object("other", [other], 7)
        publish_origin(sender)
        for rank in range(1, SIZE):
            await_mark(f"done{rank}")
        return
    receiver, where = Receiver(create_endpoint()), await_origin()
    for _ in range(3):
        check(receive_object(receiver, "mixed", where))
    assert len(receiver._links) == 1
    turned = receive_object(receiver, "turned", where, [((32, 64), torch.float32)])
    assert same(turned[0], make_tensor(77, (64, 32), torch.float32).t())
    large, _ = receive_object(receiver, "empty_last", where, [LARGE, ((0, 7), torch.float32)])
    assert same(large, make_tensor(79, *LARGE)), "what ends last is waited for"
    other = receive_object(receiver, "other", Origin(where.address, 7), [((5,), torch.float32)])
    assert same(other[0], make_tensor(78, (5,), torch.float32))
    with pytest.raises(DirectTransportError, match="no longer has object freed"):
        receive_object(receiver, "freed", where)
    check(receive_object(receiver, "mixed", where))  # the link has survived that
    receiver.release()
    check(receive_object(receiver, "mixed", where))
    with pytest.raises(DirectTransportError, match="are both on NPU"):
        receive_object(Receiver(create_endpoint()), "other", Origin(where.address, DEVICE))
    mark(f"done{RANK}")


def at_once() -> None:
    """Two processes send to each other, each with a busy main thread, and receive in several threads."""
    sender = Sender(create_endpoint())
    for number in range(6):
        keep_mixed(sender, f"object{number}", seed=100 * RANK + number)
    address = sender.address
    mark(f"origin{RANK}", json.dumps([address.host, address.port, address.token, DEVICE]))
    host, port, token, device = json.loads(await_mark(f"origin{1 - RANK}"))
    receiver, where, failures = Receiver(create_endpoint()), Origin(Address(host, port, token), device), []

    def receive(number: int) -> None:
        try:
            check(receive_object(receiver, f"object{number}", where), 100 * (1 - RANK) + number)
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
    """Send what the producing stream has not yet written once it is written."""
    size = 1 << 22
    if RANK == 0:
        sender = Sender(create_endpoint())
        torch.npu.set_device(DEVICE)
        tensor = torch.zeros(size, device=f"npu:{DEVICE}")
        for _ in range(20):
            tensor += 1
        sender.keep_object("sum", [tensor], DEVICE)
        assert not sender._objects["sum"].ready.query(), "the producer is too fast for this test"
        publish_origin(sender)
        await_mark("done1")
        return
    got = receive_object(Receiver(create_endpoint()), "sum", await_origin(), [((size,), torch.float32)])
    assert bool((got[0] == 20).all())
    mark("done1")


def run_later(call: Callable[[], Any], seconds: float = 0) -> None:
    """In another thread."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def expect_error(call: Callable[[], Any], match: str) -> float:
    began = time.monotonic()
    with pytest.raises(DirectTransportError, match=match):
        call()
    return time.monotonic() - began


def await_refused(address: Address) -> None:
    """Wait until nothing listens there: the system may close the listener of a killed process after its connections."""
    while True:
        try:
            connect(address).close()
        except ConnectionRefusedError:
            return
        except ConnectionError:  # accepted, and reset as the listener was closed
            pass
        time.sleep(0.005)


def sender_killed() -> None:
    """Kill a sender in a transfer: the receiver names it, and receives another object from another sender."""
    if RANK == 0:
        sender = Sender(create_endpoint())
        keep_mixed(sender, "mixed")
        sender._objects["mixed"] = sender._objects["mixed"]._replace(ready=_Never())
        publish_origin(sender)
        await_mark("queried")
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 2:
        await_mark("done1")
        sender = Sender(create_endpoint())
        keep_mixed(sender, "mixed")
        address = sender.address
        mark("second", json.dumps([address.host, address.port, address.token, DEVICE]))
        await_mark("done2")
        return
    receiver, where = Receiver(create_endpoint()), await_origin()
    expect_error(lambda: receive_object(receiver, "mixed", where), r"rank 0 is gone, while its producer was computing")
    await_refused(where.address)
    expect_error(
        lambda: receive_object(receiver, "mixed", where), r"has ended \(.*refused.*\)\. Produce the object again"
    )
    mark("done1")
    host, port, token, device = json.loads(await_mark("second"))
    check(receive_object(receiver, "mixed", Origin(Address(host, port, token), device)))
    mark("done2")


def die() -> None:
    await_mark("begun")
    os.kill(os.getpid(), signal.SIGKILL)


def await_unusable() -> None:
    """Wait until this process refuses transfers, as the one in progress has ended by an error on the device."""
    end = time.monotonic() + 30
    while True:
        try:
            device_error.raise_if_unusable("transfer")
        except HcclError:
            return
        assert time.monotonic() < end, "the process still counts as usable"
        time.sleep(0.05)


def killed_in_transfer() -> None:
    """One side dies in a transfer (``VICTIM``); the other raises, and refuses later transfers."""
    victim, big = int(os.environ["VICTIM"]), 96 << 20
    if victim == RANK:
        run_later(die)
    if RANK == 0:
        sender = Sender(create_endpoint())
        torch.npu.set_device(DEVICE)
        sender.keep_object("big", [torch.zeros(big, dtype=torch.uint8, device=f"npu:{DEVICE}")] * 200, DEVICE)
        publish_origin(sender)
        if victim == 1:
            await_mark("begun")
            end = time.monotonic() + 30
            while sender._links and time.monotonic() < end:
                time.sleep(0.05)
            assert not sender._links, "the sender still serves a dead receiver"
            await_unusable()
            return
        time.sleep(120)
    where = await_origin()
    one = torch.empty(big, dtype=torch.uint8, device=f"npu:{DEVICE}")
    receiver = Receiver(create_endpoint())
    run_later(lambda: mark("begun"), 1)
    expect_error(
        lambda: receiver.receive_object("big", where, DEVICE, lambda: [one] * 200), r"rank 0 .*(is gone|gave up)"
    )
    await_unusable()


def silent() -> None:
    """Let a sender take no part in HCCL (SOFTNPU_FAULTS): both end at their limit, and name the remedy."""
    if RANK == 0:
        sender = Sender(create_endpoint(limit_s=4.0))
        keep_mixed(sender, "mixed")
        publish_origin(sender)
        await_mark("done1")
        await_unusable()
        return
    receiver = Receiver(create_endpoint(limit_s=3.0))
    where = await_origin()
    reason = "(?s)was silent for [0-9.]+ s while .* 3 s of the whole|has not ended after"
    spent = expect_error(lambda: receive_object(receiver, "mixed", where), reason)
    assert spent >= 1.0
    await_unusable()
    mark("done1")


def aborted() -> None:
    """Abort from another thread, which ends both sides at once; the next object is received."""
    if RANK == 0:
        sender = Sender(create_endpoint())
        keep_mixed(sender, "mixed")
        sender.keep_object("stuck", [torch.zeros(8, device=f"npu:{DEVICE}")], DEVICE)
        sender._objects["stuck"] = sender._objects["stuck"]._replace(ready=_Never())
        publish_origin(sender)
        await_mark("done1")
        return
    receiver, where = Receiver(create_endpoint()), await_origin()
    check(receive_object(receiver, "mixed", where))
    run_later(lambda: receiver.abort("stuck", "no longer wanted"), 0.5)
    spent = expect_error(lambda: receive_object(receiver, "stuck", where), "no longer wanted")
    assert spent < 30
    receiver.abort("later", "not wanted at all")
    expect_error(lambda: receive_object(receiver, "later", where), "not wanted at all")
    check(receive_object(receiver, "mixed", where))
    mark("done1")


class _Never:
    """An event of a producer that never finishes."""

    def query(self) -> bool:
        mark("queried")
        return False


def idle() -> None:
    """Release a link without requests in its sender, and create it again when it is needed."""
    if RANK == 0:
        sender = Sender(create_endpoint(idle_s=0.5))
        keep_mixed(sender, "mixed")
        publish_origin(sender)
        await_mark("used")
        while sender._links:
            time.sleep(0.05)
        mark("idle")
        await_mark("done1")
        return
    receiver, where = Receiver(create_endpoint()), await_origin()
    for _ in range(2):
        check(receive_object(receiver, "mixed", where))
        mark("used")
        await_mark("idle")
    mark("done1")


def wrong_token() -> None:
    """Connect without the token, which is rejected."""
    if RANK == 0:
        sender = Sender(create_endpoint())
        keep_mixed(sender, "mixed")
        publish_origin(sender)
        await_mark("done1")
        return
    where, receiver = await_origin(), Receiver(create_endpoint(limit_s=10.0))
    wrong = where.address.__class__(where.address.host, where.address.port, "0" * 32)
    expect_error(
        lambda: receive_object(receiver, "mixed", Origin(wrong, where.device)),
        "does not accept this process: it closed the connection",
    )
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
