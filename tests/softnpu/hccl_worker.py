"""One rank of a test of libhccl through its C functions. A scenario is a function; a failed assertion ends the rank."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from ctypes import byref, c_char_p, c_int32, c_uint32, c_uint64, c_void_p, create_string_buffer
from pathlib import Path

import numpy as np

from tests.softnpu.hccl_c_api import (
    FP8,
    FP32,
    MAX,
    NOT_FOUND,
    NOT_SUPPORT,
    PARA,
    PTR,
    RANK,
    REMOTE,
    SIZE,
    SUM,
    SUSPENDING,
    TCP_CONNECT,
    TIMEOUT,
    HcclError,
    acl,
    all_reduce,
    async_error,
    await_mark,
    broken,
    call,
    descriptors,
    hccl,
    init,
    mark,
    new_stream,
    pointer,
    receive,
    refused,
    root_info,
    send,
    start,
    synchronize,
    threads,
    wait_until,
)


def summed(comm: c_void_p, stream: c_void_p, size: int, ranks: int = SIZE) -> None:
    """Check the result of an all-reduce of `size` numbers."""
    data = np.arange(size, dtype=np.float32) + RANK
    everyone = np.zeros(1, dtype=np.float32) + RANK
    all_reduce(comm, stream, data)
    all_reduce(comm, stream, everyone)
    synchronize(stream)
    assert (data == np.arange(size, dtype=np.float32) * ranks + everyone).all()


def basic() -> None:
    """Check sizes on both sides of every limit, and that nothing is left afterwards."""
    start()
    summed_once = new_stream()
    before = descriptors(), threads()
    for round_number in range(2):
        comm = init(f"root{round_number}")
        for size in (0, 1, 7, 8191, 8193, 300_001, 1_700_003):
            summed(comm, summed_once, size)
        call("HcclBarrier", comm, summed_once)
        synchronize(summed_once)
        call("HcclCommDestroy", comm)
    wait_until(lambda: (descriptors(), threads()) == (before[0], before[1] + 1))  # one more: the stream's
    assert "softnpu-hccl" not in Path("/proc/self/maps").read_text()


def sub_communicators() -> None:
    """Use halves of a communicator, at once and interleaved; they outlive it."""
    start()
    stream, comm, half = new_stream(), init(), c_void_p()
    members = [rank for rank in range(SIZE) if rank % 2 == RANK % 2]
    listed = (c_uint32 * len(members))(*members)

    def create(place: c_void_p, identity: int) -> None:
        count, own = c_uint32(len(members)), c_uint32(members.index(RANK))
        call("HcclCreateSubCommConfig", byref(comm), count, listed, c_uint64(identity), own, None, byref(place))

    create(half, 7)
    again = c_void_p()
    create(again, 7)
    name = create_string_buffer(128)
    call("HcclGetCommName", half, name)
    assert name.value.endswith(b"_sub_7"), name.value
    size, rank = c_uint32(), c_uint32()
    call("HcclGetRankSize", half, byref(size))
    call("HcclGetRankId", half, byref(rank))
    assert (size.value, rank.value) == (len(members), members.index(RANK))
    outside = c_void_p()
    call("HcclCreateSubCommConfig", byref(comm), c_uint32(0), None, c_uint64(8), c_uint32(0), None, byref(outside))
    assert not outside
    for _ in range(3):
        summed(comm, stream, 1000)
        summed(half, stream, 1000, len(members))
        summed(again, stream, 100_000, len(members))
    call("HcclCommDestroy", comm)
    summed(half, stream, 5, len(members))
    call("HcclCommDestroy", half)
    call("HcclCommDestroy", again)


def arguments() -> None:
    """Check that wrong calls fail at once and have no effect."""
    start()
    stream, comm, data, other = new_stream(), init(), np.ones(4, dtype=np.float32), c_void_p()
    four = c_uint64(4)
    with refused(PTR):
        call("HcclAllReduce", None, pointer(data), four, FP32, SUM, comm, stream)
    with refused(PTR):
        call("HcclAllReduce", pointer(data), pointer(data), four, FP32, SUM, None, stream)
    with refused(NOT_SUPPORT, "fp8e4m3"):
        all_reduce(comm, stream, data, kind=FP8)
    with refused(PARA, "data type 99"):
        all_reduce(comm, stream, data, kind=99)
    with refused(PARA, "reduction 9"):
        all_reduce(comm, stream, data, op=9)
    with refused(PARA, "no rank 5"):
        call("HcclBroadcast", pointer(data), four, FP32, c_uint32(5), comm, stream)
    with refused(PARA, "no rank 2"):
        send(comm, stream, np.ones(1, dtype=np.int32), 2)
    with refused(PARA, "rank 2 of 2"):
        call("HcclCommInitRootInfo", c_uint32(2), byref(root_info()), c_uint32(2), byref(other))
    with refused(NOT_SUPPORT, "HcclGetRootInfo"):
        call("HcclCommInitClusterInfo", c_char_p(b"ranks.json"), c_uint32(0), byref(other))
    with refused(NOT_SUPPORT, "HcclCommInitRootInfo"):
        call("HcclCommInitAll", c_uint32(1), byref(c_int32(0)), byref(other))
    with refused(PARA, "HcclGroupStart"):
        call("HcclGroupEnd")
    call("HcclCommSuspend", comm)
    with refused(SUSPENDING):
        all_reduce(comm, stream, data)
    call("HcclCommResume", comm)
    assert hccl.HcclGetErrorString(TCP_CONNECT) == b"tcp connect fail"
    summed(comm, stream, 10)
    all_reduce(comm, stream, data, op=MAX)
    synchronize(stream)
    call("HcclCommDestroy", comm)
    with refused(NOT_FOUND):
        call("HcclCommDestroy", comm)
    with refused(NOT_FOUND):
        all_reduce(comm, stream, data)


def grouped() -> None:
    """Send before receiving on both sides, more than any buffer holds, in groups and in a ring through oneself."""
    start()
    stream, comm, peer = new_stream(), init(), 1 - RANK
    out, back = np.full(9_000_000, RANK, dtype=np.int32), np.zeros(9_000_000, dtype=np.int32)
    for _ in range(2):
        call("HcclGroupStart")
        send(comm, stream, out, peer)
        send(comm, stream, out[:5], RANK)
        receive(comm, stream, back, peer)
        receive(comm, stream, back[:5], RANK)
        call("HcclGroupEnd")
    synchronize(stream)
    assert (back[5:] == peer).all()
    small = np.arange(3, dtype=np.int32)
    if RANK == 0:  # a single send matches a receive of a group
        send(comm, stream, small, 1)
    else:
        call("HcclGroupStart")
        receive(comm, stream, back[:3], 0)
        call("HcclGroupEnd")
    synchronize(stream)
    assert RANK == 0 or (back[:3] == small).all()
    call("HcclCommDestroy", comm)


def failing(comm: c_void_p, stream: c_void_p, code: int, *words: str) -> None:
    """Check that the stream's work fails, and that the communicator and further calls have the error `code`."""
    text = broken(stream)
    assert all(word in text for word in words), text
    assert async_error(comm) in (0, REMOTE if code == REMOTE else 0), async_error(comm)  # test_strict_hccl.py: which
    with refused(code):
        all_reduce(comm, new_stream(), np.ones(1, dtype=np.float32))


def link(comm: c_void_p, stream: c_void_p, sender: int, receiver: int) -> None:
    """Make the link of a direction, which the first call for it does, and which needs both sides."""
    if RANK in (sender, receiver):
        data = np.zeros(1, dtype=np.int32)
        (send if sender == RANK else receive)(comm, stream, data, receiver if sender == RANK else sender)
        synchronize(stream)


def dead_peer() -> None:
    """Kill a rank: receivers, and senders with full buffers, detect it at once."""
    start()
    stream, comm = new_stream(), init()
    summed(comm, stream, 10)
    link(comm, stream, 1, 0)
    link(comm, stream, 2, 1)
    data = np.zeros(1_000_000, dtype=np.int32)
    if RANK == 1:
        await_mark("waiting")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 0:
        receive(comm, stream, data, 1)
        mark("waiting")
    else:
        send(comm, stream, data, 1)
    failing(comm, stream, REMOTE, "rank 1 (", "is gone")
    call("HcclCommDestroy", comm)


def peer_leaves() -> None:
    """Destroy a communicator after a send: the data arrives, and a wait for more fails."""
    start()
    stream, comm = new_stream(), init()
    link(comm, stream, 1, 0)
    data = np.arange(1000, dtype=np.int32)
    if RANK == 1:
        send(comm, stream, data, 0)
        synchronize(stream)
        call("HcclCommDestroy", comm)
        mark("left")
        return
    got = np.zeros(1000, dtype=np.int32)
    receive(comm, stream, got, 1)
    synchronize(stream)
    assert (got == data).all()
    await_mark("left")
    assert async_error(comm) == 0
    receive(comm, stream, got, 1)
    failing(comm, stream, REMOTE, "rank 1 (", "has destroyed its communicator")
    call("HcclCommDestroy", comm)


def destroy_while_waiting() -> None:
    """Destroy a communicator with running and queued work, from any thread and several at once."""
    start()
    stream, comm = new_stream(), init()
    link(comm, stream, 1, 0)
    if RANK == 1:
        await_mark("done")
        call("HcclCommDestroy", comm)
        return
    data = np.zeros(10, dtype=np.int32)
    for _ in range(3):
        receive(comm, stream, data, 1)
    time.sleep(0.1)
    codes: list[int] = []
    destroyers = [threading.Thread(target=lambda: codes.append(hccl.HcclCommDestroy(comm))) for _ in range(4)]
    for thread in destroyers:
        thread.start()
    for thread in destroyers:
        thread.join()
    assert sorted(codes) == [0, NOT_FOUND, NOT_FOUND, NOT_FOUND], codes
    assert "has been destroyed" in broken(stream)
    mark("done")


def silent_peer() -> None:
    """Make rank 1 silent (fault hccl_silent): all ranks time out, and each names the rank that it waited for."""
    start()
    stream, comm = new_stream(), init()
    began = time.monotonic()
    all_reduce(comm, stream, np.ones(10, dtype=np.float32))
    failing(
        comm,
        stream,
        TIMEOUT,
        "because of the fault hccl_silent" if RANK == 1 else "waited 3 s (HCCL_EXEC_TIMEOUT) for rank 1 (",
    )
    assert time.monotonic() - began >= 2.9
    mark(f"timed out {RANK}")
    for rank in range(SIZE):  # a rank that destroys its communicator early would fail the others with that instead
        await_mark(f"timed out {rank}")
    call("HcclCommDestroy", comm)


def mismatch() -> None:
    """Call different operations: all ranks get the error, also one that need not wait."""
    start()
    stream, comm = new_stream(), init()
    data = np.ones(100, dtype=np.float32)

    def broadcast() -> None:
        call("HcclBroadcast", pointer(data), c_uint64(100), FP32, c_uint32(0), comm, stream)

    def reduce_scatter() -> None:
        call("HcclReduceScatter", pointer(data), pointer(data), c_uint64(50), FP32, SUM, comm, stream)

    broadcast()  # both have links, which two different first calls would not make
    reduce_scatter()
    synchronize(stream)
    if RANK == 0:
        broadcast()
        synchronize(stream)  # its message fits into a buffer, so the root is done
    else:
        reduce_scatter()
        failing(comm, stream, PARA, "ReduceScatter sum of float32", "Broadcast of float32 with root 0 of 400 bytes")
    mark(f"failed {RANK}")
    await_mark("failed 1")
    time.sleep(0.5)  # until rank 1's report is here
    with refused(PARA, "ReduceScatter", "Broadcast"):
        all_reduce(comm, stream, data)
    call("HcclCommDestroy", comm)


def missing_rank() -> None:
    """Check that the error names a rank that never joins."""
    start()
    with refused(TIMEOUT, "rank 1, 3 did not join within 3 s (HCCL_CONNECT_TIMEOUT)", "joined: rank 0 ("):
        init()
    wait_until(lambda: "socket" not in descriptors())


def disagreement() -> None:
    """Try to form an impossible communicator: all ranks get the reason."""
    start()
    with refused(PARA, "says that there are"):
        init("sizes", size=2 + RANK)
    with refused(PARA, "there is already rank 0"):
        init("ranks", rank=0)
    if RANK == 1:
        # That root has given up: its port is closed, or being closed.
        with refused(TCP_CONNECT, "the root", or_code=REMOTE):
            init("ranks")
    assert acl.aclrtSetDevice(0) == 0
    os.environ["HCCL_NPU_SOCKET_PORT_RANGE"] = "auto"  # without it their ports on the NPU collide first
    with refused(PARA, "uses the same NPU"):
        init("devices")


def slow_link() -> None:
    """Check that messages between nodes take at least the configured time, in order and complete."""
    start()
    stream, comm, peer = new_stream(), init(), 1 - RANK
    began = time.monotonic()
    for turn in range(5):
        ball = np.full(3, turn, dtype=np.int32)
        if turn % 2 == RANK:
            send(comm, stream, ball, peer)
        else:
            ball[:] = -1
            receive(comm, stream, ball, peer)
        synchronize(stream)
        assert (ball == turn).all()
    assert time.monotonic() - began >= 5 * 0.05 if RANK == 1 else 4 * 0.05
    data = np.arange(250_000, dtype=np.int32)  # 8 million bits
    got = np.zeros_like(data)
    began = time.monotonic()
    for _ in range(2):
        if RANK == 0:
            send(comm, stream, data, 1)
        else:
            receive(comm, stream, got, 0)
            synchronize(stream)
            assert (got == data).all()
    if RANK == 1:
        assert time.monotonic() - began >= 0.35
    synchronize(stream)
    call("HcclCommDestroy", comm)


def bad_address() -> None:
    """Check that the error explains an HCCL_IF_IP with another node's address, as in a driver's environment."""
    start()
    os.environ["HCCL_IF_IP"] = "203.0.113.7"
    with refused(PARA, "HCCL_IF_IP=203.0.113.7 is no address of this node", "lo 127.0.0.1"):
        root_info("first")
    del os.environ["HCCL_IF_IP"]
    os.environ["HCCL_SOCKET_IFNAME"] = "nosuch"
    with refused(PARA, "HCCL_SOCKET_IFNAME=nosuch matches no interface"):
        root_info("second")
    for setting in ("lo", "=lo", "^nosuch,eth,enp"):
        os.environ["HCCL_SOCKET_IFNAME"] = setting
        root_info(f"third{setting}")
    os.environ["HCCL_SOCKET_IFNAME"], os.environ["HCCL_IF_BASE_PORT"] = "lo", "38440"
    assert b"127.0.0.1" in bytes(root_info("fourth"))


if __name__ == "__main__":
    try:
        globals()[sys.argv[1]]()
    except HcclError as error:
        raise SystemExit(f"HcclError {error}") from error
