"""One rank of a test of libhccl through the real torch_npu. The scenario is a function here."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
EVERYONE = range(SIZE)


def start() -> None:
    """Return the process group of all ranks."""
    torch.npu.set_device(RANK)
    store, limit = f"file://{FOLDER}/store", datetime.timedelta(seconds=80)
    dist.init_process_group("hccl", init_method=store, rank=RANK, world_size=SIZE, timeout=limit)


def made(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return the data of a rank, on the CPU: small whole numbers, so that sums and products are exact in every type."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-3, 4, (count,), generator=generator).to(dtype)


def npu(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on this rank's device."""
    return tensor.to(f"npu:{RANK}")


def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor on this rank's device."""
    return torch.empty(count, dtype=dtype, device=f"npu:{RANK}")


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Check that both are equal."""
    found = found.cpu()
    assert found.dtype == expected.dtype and torch.equal(found, expected), f"{what}: {found} is not {expected}"


def reductions(dtype: torch.dtype) -> None:
    """Check all_reduce, reduce, reduce_scatter."""
    rows = torch.stack([made(rank, 6 * SIZE, dtype) for rank in EVERYONE])
    wide = rows.to(torch.float64) if dtype.is_floating_point else rows
    for op, expected in (
        (dist.ReduceOp.SUM, wide.sum(0)),
        (dist.ReduceOp.PRODUCT, wide.prod(0)),
        (dist.ReduceOp.MAX, wide.max(0).values),
        (dist.ReduceOp.MIN, wide.min(0).values),
    ):
        data = npu(rows[RANK])
        dist.all_reduce(data, op=op)
        same(data, expected.to(dtype), f"all_reduce {op} {dtype}")
        part = empty(6, dtype)
        dist.reduce_scatter_tensor(part, npu(rows[RANK]), op=op)
        same(part, expected.to(dtype)[6 * RANK : 6 * RANK + 6], f"reduce_scatter {op} {dtype}")
    total = wide.sum(0).to(dtype)
    for root in EVERYONE:
        data = npu(rows[RANK])
        dist.reduce(data, root)
        if root == RANK:
            same(data, total, f"reduce {dtype}")


def converted_reductions() -> None:
    """Check all_reduce of what torch_npu reduces as another type, or divides afterwards: bool, uint8, averages."""
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32):
        data = npu(torch.full((5,), RANK + 1, dtype=dtype))
        dist.all_reduce(data, op=dist.ReduceOp.AVG)
        mean = sum(rank + 1 for rank in EVERYONE) / SIZE
        same(data, torch.full((5,), mean).to(dtype), f"average {dtype}")
    data = npu(torch.tensor([RANK == 0, False]))
    dist.all_reduce(data, op=dist.ReduceOp.MAX)
    same(data, torch.tensor([True, False]), "all_reduce of bool")


def movements(dtype: torch.dtype) -> None:
    """Check broadcast, all_gather, gather, scatter, all_to_all."""
    rows = [made(rank, 5 * SIZE, dtype, seed=1) for rank in EVERYONE]
    for root in EVERYONE:
        data = npu(rows[RANK])
        dist.broadcast(data, root)
        same(data, rows[root], f"broadcast {dtype}")
        part = empty(5, dtype)
        dist.scatter(part, [npu(chunk) for chunk in rows[root].chunk(SIZE)] if root == RANK else None, src=root)
        same(part, rows[root].chunk(SIZE)[RANK], f"scatter {dtype}")
    whole = empty(5 * SIZE * SIZE, dtype)
    dist.all_gather_into_tensor(whole, npu(rows[RANK]))
    same(whole, torch.cat(rows), f"all_gather {dtype}")
    lengths = [rank + 1 for rank in EVERYONE]
    parts = [empty(length, dtype) for length in lengths]
    dist.all_gather(parts, npu(rows[RANK][: RANK + 1]))
    uneven = torch.cat([rows[rank][: rank + 1] for rank in EVERYONE])
    same(torch.cat([part.cpu() for part in parts]), uneven, f"all_gather uneven {dtype}")
    exchanged = empty(5 * SIZE, dtype)
    dist.all_to_all_single(exchanged, npu(rows[RANK]))
    same(exchanged, torch.cat([row.chunk(SIZE)[RANK] for row in rows]), f"all_to_all {dtype}")


def uneven_all_to_all(dtype: torch.dtype) -> None:
    """Send i + 2j numbers from rank i to rank j: none from the first to itself."""
    counts = [[i + 2 * j for j in EVERYONE] for i in EVERYONE]
    rows = [made(rank, sum(counts[rank]), dtype, seed=2) for rank in EVERYONE]
    incoming = [counts[peer][RANK] for peer in EVERYONE]
    got = empty(sum(incoming), dtype)
    dist.all_to_all_single(got, npu(rows[RANK]), incoming, counts[RANK])
    same(got, torch.cat([row.split(counts[peer])[RANK] for peer, row in enumerate(rows)]), f"uneven all_to_all {dtype}")


def point_to_point(dtype: torch.dtype) -> None:
    """Send batches around the ring in both directions, and use plain sends and receives."""
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    own, from_before, from_after = npu(made(RANK, 9, dtype)), empty(9, dtype), empty(9, dtype)
    operations = [dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, from_before, before)]
    if SIZE > 2:
        operations += [dist.P2POp(dist.isend, own, before), dist.P2POp(dist.irecv, from_after, after)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    same(from_before, made(before, 9, dtype), f"batch {dtype}")
    if SIZE > 2:
        same(from_after, made(after, 9, dtype), f"batch back {dtype}")
    if RANK < 2:
        got = empty(9, dtype)
        for sender in (0, 1):
            if sender == RANK:
                dist.send(own, 1 - RANK)
            else:
                dist.recv(got, sender)
        same(got, made(1 - RANK, 9, dtype), f"send and recv {dtype}")


def groups_and_streams() -> None:
    """Use communicators of some and of all ranks at once from streams of their own."""
    pair, all_again = dist.new_group([0, 1]), dist.new_group(list(EVERYONE))
    first, second = torch.npu.Stream(), torch.npu.Stream()
    data = [npu(torch.full((300_000,), RANK + 1, dtype=torch.int32)) for _ in range(3)]
    torch.npu.synchronize()
    for _ in range(3):
        works = [dist.all_reduce(data[0], async_op=True)]
        with torch.npu.stream(first):
            works.append(dist.all_reduce(data[1], group=all_again, async_op=True))
        with torch.npu.stream(second):
            if RANK < 2:
                works.append(dist.all_reduce(data[2], group=pair, async_op=True))
        for work in reversed(works):
            work.wait()
    torch.npu.synchronize()
    total = sum(rank + 1 for rank in EVERYONE) * SIZE**2
    assert (data[0].cpu() == total).all() and (data[1].cpu() == total).all()
    assert RANK >= 2 or (data[2].cpu() == 3 * 4).all()


def large() -> None:
    """Reduce 64 MB, and send them both ways at once."""
    count = 16 << 20
    pattern = torch.arange(count, dtype=torch.int32)
    data = npu(pattern * (RANK + 1))
    dist.all_reduce(data)
    assert torch.equal(data.cpu(), pattern * sum(rank + 1 for rank in EVERYONE))
    if RANK < 2:
        out, back = npu(pattern ^ RANK), empty(count, torch.int32)
        peer = 1 - RANK
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)]):
            work.wait()
        assert torch.equal(back.cpu(), pattern ^ peer)


def graph() -> None:
    """Check that a captured all_reduce runs at each replay, on the input of that moment."""
    data = npu(torch.zeros(1000))
    dist.all_reduce(data)
    recorded = torch.npu.NPUGraph()
    with torch.npu.graph(recorded):
        dist.all_reduce(data)
    for turn in range(3):
        data.copy_(torch.full((1000,), float(RANK + turn)))
        recorded.replay()
        torch.npu.synchronize()
        assert (data.cpu() == sum(rank + turn for rank in EVERYONE)).all(), data


def listening() -> list[str]:
    """Return inodes of the listening sockets of this process."""
    own = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:
            continue  # the listing's own
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1])
    return found


def collectives() -> None:
    """Return all of it."""
    start()
    for dtype in TYPES:
        reductions(dtype)
        movements(dtype)
        uneven_all_to_all(dtype)
        point_to_point(dtype)
    converted_reductions()
    dist.barrier()
    groups_and_streams()
    graph()
    large()
    torch.npu.synchronize()
    assert listening() == [], listening()
    dist.destroy_process_group()


def killed() -> None:
    """Kill the last rank: the waits of the others fail."""
    start()
    data = npu(torch.ones(4))
    dist.all_reduce(data)
    torch.npu.synchronize()
    if RANK == SIZE - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(data)
    torch.npu.synchronize()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
