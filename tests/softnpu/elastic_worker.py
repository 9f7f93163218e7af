"""One rank of a test of stateless groups. The scenario is a function here."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.utils import create_tcp_store, get_cached_tcp_store_client
from vllm_ascend.utils import adapt_patch

from vllm_ray_ascend.elastic_ep import experts, groups
from vllm_ray_ascend.errors import HcclError

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(os.environ["TEST_FOLDER"])
HOST = "127.0.0.1"
LATE_S = 3.0
_stores: list[object] = []


def meet() -> int:
    """Return the port of the store at which the ranks meet, which rank 0 creates."""
    path = FOLDER / "port"
    if RANK == 0:
        store = create_tcp_store(HOST, 0, is_master=True, world_size=-1, wait_for_workers=False)
        _stores.append(store)
        (FOLDER / "port.new").write_text(str(store.port))
        (FOLDER / "port.new").rename(path)
    while not path.exists():
        time.sleep(0.05)
    return int(path.read_text())


def make(name: str, ranks: range, port: int) -> groups.NpuStatelessGroup:
    """Return a stateless group of ``ranks``, as vLLM makes it."""
    return groups.NpuStatelessGroup(
        group_ranks=[[*ranks]],
        local_rank=0,
        torch_distributed_backend="hccl",
        use_device_communicator=True,
        coord_store=get_cached_tcp_store_client(HOST, port),
        group_name=name,
        host=HOST,
        global_rank=RANK,
        global_world_size=SIZE,
    )


def check(group: groups.NpuStatelessGroup) -> None:
    """Check what models and vLLM use of a group."""
    rank, size = group.rank_in_group, group.world_size
    assert dist.get_rank(group.device_group) == rank
    own = torch.full((2,), float(rank), device=group.device)
    assert group.all_gather(own, 0).tolist() == [float(each) for each in range(size) for _ in range(2)]
    assert group.all_reduce(own.clone()).tolist() == [float(sum(range(size)))] * 2
    spread = group.reduce_scatter(torch.arange(2.0 * size, device=group.device), 0)
    assert spread.tolist() == [size * (2.0 * rank), size * (2.0 * rank + 1)]
    got = group.broadcast(torch.tensor([rank], device=group.device), size - 1)
    assert got.tolist() == [size - 1] and got.device == group.device
    group.barrier()


def groups_of_two_sizes(port: int) -> None:
    """Use a second group of the same ranks beside the first, and one of fewer; each can be destroyed beside others."""
    first = make("ep", range(SIZE), port)
    second = make("eplb", range(SIZE), port)
    groups.connect(first, second)
    for group in (first, second, first):
        check(group)
    fewer = make("dp", range(SIZE - 1), port) if RANK < SIZE - 1 else None
    if fewer is not None:
        check(fewer)
        fewer.destroy()
    second.destroy()
    check(first)
    first.destroy()
    first.destroy()


def late_rank(port: int) -> None:
    """Check that other threads of a rank run while it waits in HCCL for another rank."""
    group = make("ep", range(SIZE), port)
    ticks = [time.monotonic()]
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.05):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    if RANK == SIZE - 1:
        time.sleep(LATE_S)
    groups.connect(group)
    done.set()
    thread.join()
    if RANK == 0:
        assert ticks[-1] - ticks[0] > LATE_S / 2, "the other rank was not late"
        assert len(ticks) > 5, f"the other thread ran {len(ticks)} times"
    group.destroy()


def rank_without_links(port: int) -> None:
    """One rank of new groups fails in HCCL: the others serve while they wait for it, and after they have given up."""
    serving = make("dp", range(SIZE - 1), port) if RANK < SIZE - 1 else None
    if serving is not None:
        groups.connect(serving)
    new = [make(name, range(SIZE), port) for name in ("ep", "eplb")]
    failed = threading.Thread(target=expect_no_links, args=new)
    failed.start()
    steps = 0
    while serving is not None and serve(serving, failed.is_alive()):
        steps += 1
    failed.join()
    if serving is not None:
        assert steps > 10, "nobody served while the others waited"
        for group in new:
            group.destroy()
        assert not serve(serving, False)


def expect_no_links(*new: groups.NpuStatelessGroup) -> None:
    """Connect groups of which the last rank cannot."""
    try:
        groups.connect(*new)
    except HcclError as error:
        print(f"rank {RANK}: {error}")
        return
    os._exit(3)


def serve(group: groups.NpuStatelessGroup, waits: bool) -> bool:
    """Do what a step does: compute, wait for an event, exchange results. Return whether some rank ``waits``."""
    event = torch.npu.Event()
    value = torch.full((4,), float(waits), device=group.device) * 2
    event.record()
    event.synchronize()
    return bool(group.all_reduce(value)[0] > 0)


def experts_move(port: int) -> None:
    """Send two tensors from each rank to the next one, over HCCL and over gloo, twice each."""
    group = make("eplb", range(SIZE), port)
    for kind in (experts.HcclExpertCommunicator, experts.GlooExpertCommunicator):
        communicator = kind(group)
        for turn in range(2):
            sent = [torch.full((3, 4), 10.0 * turn + RANK, device=group.device), torch.arange(5, device=group.device)]
            received = [torch.zeros_like(each) for each in sent]
            communicator.add_send(sent, (RANK + 1) % SIZE, 0)
            communicator.add_recv(received, (RANK - 1) % SIZE, 0)
            communicator.execute()
            assert received[0].unique().tolist() == [10.0 * turn + (RANK - 1) % SIZE], (kind, received)
            assert received[1].tolist() == [*range(5)]
        communicator.execute()
    group.destroy()


if __name__ == "__main__":
    torch.npu.set_device(RANK)
    adapt_patch(True)
    adapt_patch()
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store{RANK}", rank=0, world_size=1)
    groups.install()
    scenario = globals()[sys.argv[1]]
    with set_current_vllm_config(VllmConfig()):
        scenario(meet())
    (FOLDER / f"done{RANK}").touch()
    while len(list(FOLDER.glob("done*"))) < SIZE:  # rank 0 has the stores of all
        time.sleep(0.05)
