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
    return torch.equal(got.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


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


if __name__ == "__main__":
    globals()[sys.argv[1]]()
