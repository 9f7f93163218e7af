"""What HCCL's documents say and the software NPU enforces, one test a rule. As a program, this file is one rank.

Pages are those of CANN's documentation at hiascend.com, by their file names; 8.5 where no release is given.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.softnpu.ranks import Rank, run_ranks, succeeded

PARA, INTERNAL, UNAVAIL, TIMEOUT, AGAIN, REMOTE = 1, 4, 7, 9, 20, 21
SHORT = {"SOFTNPU_CONNECT_TIMEOUT": "8"}  # enough for a busy machine to start both ranks


def run(scenario: str, ranks: int | list[Rank], folder: Path, **variables: str) -> None:
    succeeded(run_ranks("test_strict_hccl", scenario, ranks, folder, variables))


def test_links_are_made_by_the_first_call_of_an_operator(tmp_path: Path) -> None:
    """envref_07_0149, HCCL_CONNECT_TIMEOUT: it limits the link set-up, in which devices wait for each other."""
    run("first_call_blocks", 2, tmp_path)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_send_waits_for_the_receiver(nodes: int, tmp_path: Path) -> None:
    """hicann/hccl, algorithms of Send/Recv and collectives: RxAck of the sender comes before its data."""
    run("receiver_first", [Rank(rank, {"SOFTNPU_NODE": f"node{rank % nodes}"}) for rank in range(2)], tmp_path)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_sender_waits_also_for_a_receiver_without_the_rule(nodes: int, tmp_path: Path) -> None:
    variables = [{}, {"SOFTNPU_STRICT": "-receiver-first"}]
    ranks = [Rank(rank, {"SOFTNPU_NODE": f"node{rank % nodes}", **variables[rank]}) for rank in range(2)]
    run("receiver_first", ranks, tmp_path)


def test_link_set_up_ends_at_the_limit_and_does_not_see_a_dead_peer(tmp_path: Path) -> None:
    """The same page: "the actual time is that of this variable and 20 s"; only a test waits for less."""
    outcomes = run_ranks("test_strict_hccl", "nobody_comes", 2, tmp_path, SHORT)
    assert [each.code for each in outcomes] == [0, 9], outcomes


@pytest.mark.parametrize("fault", ["block", "code"])
def test_link_set_up_fails_on_demand(fault: str, tmp_path: Path) -> None:
    text = "link_setup:rank=0" + (",code=19" if fault == "code" else "")
    run("link_set_up_fails", [Rank(0, {"SOFTNPU_FAULTS": text, "FAULT": fault}), Rank(1)], tmp_path, **SHORT)


def test_destroy_ends_a_call_that_hangs_in_link_set_up(tmp_path: Path) -> None:
    """hcclcpp_07_0010, HcclCommDestroy: from another thread it succeeds where link set-up hangs, and ends that call."""
    run("destroyed_in_set_up", 2, tmp_path)


def test_destroy_asks_to_try_again_while_a_call_is_in_progress(tmp_path: Path) -> None:
    """The same page: HCCL_E_AGAIN while links are being made, and in other occupied states."""
    run("destroyed_too_early", 2, tmp_path)


def test_destroy_asks_to_try_again_on_demand(tmp_path: Path) -> None:
    run("destroy_again", 2, tmp_path, SOFTNPU_FAULTS="destroy_again:nth=1")


@pytest.mark.parametrize(("nodes", "code"), [(1, 0), (2, REMOTE)])
def test_asynchronous_errors_are_those_of_rdma(nodes: int, code: int, tmp_path: Path) -> None:
    """hcclcpp_07_0034, HcclGetCommAsyncError: "only" RDMA ERROR CQE, 21; 0 means none."""
    kind = {"SOFTNPU_STRICT": "-peer-death", "CODE": str(code)}
    ranks = [Rank(rank, {"SOFTNPU_NODE": f"node{rank % nodes}", **kind}) for rank in range(2)]
    outcomes = run_ranks("test_strict_hccl", "asynchronous_error", ranks, tmp_path)
    assert [each.code for each in outcomes] == [0, 9], outcomes


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_end_of_a_peer_of_the_node_is_not_seen(nodes: int, tmp_path: Path) -> None:
    """The same page: nothing but RDMA reports it, so within a node an operation ends at HCCL_EXEC_TIMEOUT."""
    ranks = [Rank(rank, {"SOFTNPU_NODE": f"node{rank % nodes}", "NODES": str(nodes)}) for rank in range(2)]
    outcomes = run_ranks("test_strict_hccl", "peer_ends", ranks, tmp_path, {"HCCL_EXEC_TIMEOUT": "5"})
    assert [each.code for each in outcomes] == [0, 9], outcomes


@pytest.mark.parametrize("value", ["-5", "abc", "1e99"])
def test_the_limit_of_an_operation_is_a_number(value: str, tmp_path: Path) -> None:
    """envref_07_0076, HCCL_EXEC_TIMEOUT: from 0, which is no limit, to 2147483647."""
    run("no_such_limit", 1, tmp_path, HCCL_EXEC_TIMEOUT=value)


def test_an_operation_may_have_no_limit(tmp_path: Path) -> None:
    run("waits_for_ever", 2, tmp_path, HCCL_EXEC_TIMEOUT="0")


def test_a_collective_has_links_of_its_own_above_256_kb(tmp_path: Path) -> None:
    """hicann/hccl, all_reduce_operator.cc: links are kept by operator and algorithm, which its size chooses."""
    run("large_collective", 2, tmp_path)


def test_an_rdma_error_on_demand(tmp_path: Path) -> None:
    run("rdma_error", 2, tmp_path, SOFTNPU_FAULTS="rdma_error:rank=1")


@pytest.mark.parametrize("value", ["119", "7201", "2", "0", "abc", "120.5"])
def test_the_limit_of_link_set_up_has_limits(value: str, tmp_path: Path) -> None:
    """envref_07_0149, HCCL_CONNECT_TIMEOUT: a whole number from 120 to 7200."""
    run("invalid_limit", 1, tmp_path, HCCL_CONNECT_TIMEOUT=value)


def test_a_batch_has_one_item_for_each_peer_and_direction(tmp_path: Path) -> None:
    """hcclcpp_07_0033, HcclBatchSendRecv: "must not contain duplicate sending or receiving tasks" for one rank."""
    run("two_items", 2, tmp_path)


def test_processes_of_one_npu_compete_for_its_port(tmp_path: Path) -> None:
    """envref_07_0144, HCCL_NPU_SOCKET_PORT_RANGE: 16666 where unset; processes of an NPU compete."""
    run("shared_npu", 2, tmp_path)


def test_an_npu_port_in_use_on_demand(tmp_path: Path) -> None:
    run("npu_port_in_use", 1, tmp_path, SOFTNPU_FAULTS="npu_port_in_use:device=0")


# ---- one rank


def call_in_thread(call: Callable[[], None]) -> tuple[Thread, list[int]]:
    """Start ``call`` in a thread; return it, and the list to which it adds the code of HCCL with which it ends."""
    from tests.softnpu.hccl_c_api import HcclError, acl

    codes: list[int] = []

    def run_call() -> None:
        assert acl.aclrtSetDevice(int(os.environ["RANK"])) == 0
        try:
            call()
            codes.append(0)
        except HcclError as error:
            codes.append(error.code)

    thread = Thread(target=run_call)
    thread.start()
    return thread, codes


def numbers(count: int = 10) -> Any:
    import numpy as np

    return np.arange(count, dtype=np.int32)


def first_call_blocks() -> None:
    from tests.softnpu.hccl_c_api import (
        RANK,
        await_mark,
        call,
        init,
        mark,
        new_stream,
        receive,
        send,
        start,
        synchronize,
    )

    start()
    stream, comm, data = new_stream(), init(), numbers()
    if RANK == 1:
        await_mark("sending")
        time.sleep(0.5)
        mark("received")
        receive(comm, stream, data, 0)
        receive(comm, stream, data, 0)
    else:
        mark("sending")
        send(comm, stream, data, 1)
        assert Path(os.environ["TEST_FOLDER"], "received.mark").exists(), "the first send did not wait for the receiver"
        send(comm, stream, data, 1)  # the link exists
    synchronize(stream)
    call("HcclCommDestroy", comm)


def receiver_first() -> None:
    from ctypes import c_int32

    from tests.softnpu.hccl_c_api import (
        RANK,
        acl,
        await_mark,
        call,
        init,
        mark,
        new_stream,
        receive,
        send,
        start,
        synchronize,
    )

    start()
    stream, comm, data = new_stream(), init(), numbers()
    (receive if RANK else send)(comm, stream, data, 1 - RANK)  # makes the link
    synchronize(stream)
    if RANK == 0:
        send(comm, stream, data, 1)
        assert acl.aclrtSynchronizeStreamWithTimeout(stream, c_int32(500)) != 0, "sent before the receiver came"
        mark("waited")
    else:
        await_mark("waited")
        receive(comm, stream, data, 0)
    synchronize(stream)
    call("HcclCommDestroy", comm)


def nobody_comes() -> None:
    from tests.softnpu.hccl_c_api import RANK, await_mark, init, mark, new_stream, refused, send, start

    start()
    stream, comm = new_stream(), init()
    if RANK == 1:
        await_mark("sending")
        os._exit(9)
    mark("sending")
    with refused(TIMEOUT, "EI0006", "Send/Recv to rank 1", "within 8 s"):
        send(comm, stream, numbers(), 1)


def link_set_up_fails() -> None:
    from tests.softnpu.hccl_c_api import RANK, call, init, new_stream, receive, refused, send, start

    start()
    stream, comm = new_stream(), init()
    own = TIMEOUT if os.environ.get("FAULT", "block") == "block" else 19
    with refused(TIMEOUT if RANK else own):
        (receive if RANK else send)(comm, stream, numbers(), 1 - RANK)
    call("HcclCommDestroy", comm)


def destroyed_in_set_up() -> None:
    from tests.softnpu.hccl_c_api import RANK, await_mark, call, error_text, init, mark, new_stream, send, start

    start()
    stream, comm = new_stream(), init()
    if RANK == 1:
        await_mark("destroyed")
        return
    thread, codes = call_in_thread(lambda: send(comm, stream, numbers(), 1))
    time.sleep(1.5)  # as long as HCCL takes to call it stuck
    assert thread.is_alive()
    call("HcclCommDestroy", comm)
    thread.join(20)
    assert codes == [INTERNAL], (codes, error_text())
    mark("destroyed")


def destroyed_too_early() -> None:
    from tests.softnpu.hccl_c_api import RANK, await_mark, call, init, mark, new_stream, receive, refused, send, start

    start()
    stream, comm = new_stream(), init()
    if RANK == 1:
        await_mark("refused")
        receive(comm, stream, numbers(), 0)
        await_mark("over")
        return
    thread, codes = call_in_thread(lambda: send(comm, stream, numbers(), 1))
    time.sleep(0.3)
    with refused(AGAIN, "try again"):
        call("HcclCommDestroy", comm)
    mark("refused")
    thread.join(20)
    assert codes == [0], codes
    call("HcclCommDestroy", comm)
    mark("over")


def destroy_again() -> None:
    from tests.softnpu.hccl_c_api import call, init, refused, start

    start()
    comm = init()
    with refused(AGAIN, "comm is in use"):
        call("HcclCommDestroy", comm)
    call("HcclCommDestroy", comm)


def asynchronous_error() -> None:
    from tests.softnpu.hccl_c_api import async_error

    comm, text = receive_from_one_that_ends()
    assert "is gone" in text
    assert async_error(comm) == int(os.environ["CODE"])


def peer_ends() -> None:
    _, text = receive_from_one_that_ends()
    assert ("HCCL_EXEC_TIMEOUT" if os.environ["NODES"] == "1" else "is gone") in text


def receive_from_one_that_ends() -> tuple[Any, str]:
    """Return the communicator, and the error of a second receive from rank 1, which ends after one send."""
    from tests.softnpu.hccl_c_api import RANK, broken, init, new_stream, receive, send, start, synchronize

    start()
    stream, comm = new_stream(), init()
    if RANK == 1:
        send(comm, stream, numbers(), 0)
        synchronize(stream)
        os._exit(9)
    receive(comm, stream, numbers(), 1)
    receive(comm, stream, numbers(), 1)
    return comm, broken(stream)


def no_such_limit() -> None:
    from tests.softnpu.hccl_c_api import init, refused, start

    start()
    with refused(PARA, "HCCL_EXEC_TIMEOUT"):
        init()


def waits_for_ever() -> None:
    from tests.softnpu.hccl_c_api import RANK, await_mark, init, mark, new_stream, receive, send, start, synchronize

    start()
    stream, comm = new_stream(), init()
    if RANK == 0:
        receive(comm, stream, numbers(), 1)
        receive(comm, stream, numbers(), 1)
        time.sleep(1)
        mark("waited")
        synchronize(stream)
    else:
        send(comm, stream, numbers(), 0)
        await_mark("waited")
        send(comm, stream, numbers(), 0)
        synchronize(stream)


def large_collective() -> None:
    import numpy as np

    from tests.softnpu.hccl_c_api import RANK, all_reduce, await_mark, init, mark, new_stream, start, synchronize

    start()
    stream, comm, large = new_stream(), init(), np.ones(1 << 17, dtype=np.float32)
    all_reduce(comm, stream, numbers().astype(np.float32))
    synchronize(stream)
    if RANK == 1:
        await_mark("called")
        time.sleep(0.5)
        all_reduce(comm, stream, large)
    else:
        thread, codes = call_in_thread(lambda: all_reduce(comm, stream, large))
        mark("called")
        time.sleep(0.2)
        assert thread.is_alive() and not codes
        thread.join(20)
    synchronize(stream)
    assert (large == 2).all()


def rdma_error() -> None:
    from tests.softnpu.hccl_c_api import RANK, async_error, call, init, start

    start()
    comm = init()
    assert async_error(comm) == (REMOTE if RANK == 1 else 0)
    call("HcclCommDestroy", comm)


def invalid_limit() -> None:
    from tests.softnpu.hccl_c_api import refused, root_info, start

    start()
    with refused(PARA, "EI0001", f"HCCL_CONNECT_TIMEOUT={os.environ['HCCL_CONNECT_TIMEOUT']}", "120 to 7200"):
        root_info()


def two_items() -> None:
    from ctypes import Structure, c_int, c_uint32, c_uint64, c_void_p

    from tests.softnpu.hccl_c_api import INT32, RANK, call, init, new_stream, pointer, refused, start, synchronize

    class Item(Structure):
        _fields_ = (("kind", c_int), ("data", c_void_p), ("count", c_uint64), ("dtype", c_int), ("peer", c_uint32))

    start()
    stream, comm, peer = new_stream(), init(), 1 - RANK
    out, back = numbers() + RANK, numbers()
    send_item, receive_item = (Item(kind, pointer(data), 10, INT32, peer) for kind, data in ((0, out), (1, back)))
    for twice, words in ((send_item, "send to"), (receive_item, "receive from")):
        with refused(PARA, f"two items {words} rank {peer}"):
            call("HcclBatchSendRecv", (Item * 2)(twice, twice), c_uint32(2), comm, stream)
    call("HcclBatchSendRecv", (Item * 2)(send_item, receive_item), c_uint32(2), comm, stream)
    synchronize(stream)
    assert (back == numbers() + peer).all()
    call("HcclCommDestroy", comm)


def shared_npu() -> None:
    from ctypes import byref, c_uint32, c_void_p

    from tests.softnpu.hccl_c_api import RANK, await_mark, call, error_text, hccl, mark, root_info, start

    def init(rank: int, info: Any, place: c_void_p) -> int:
        return int(hccl.HcclCommInitRootInfo(c_uint32(2), byref(info), c_uint32(rank), byref(place)))

    start(0)
    if RANK == 1:
        await_mark("connecting")
        time.sleep(0.5)
        info = root_info("second", root=1)
        assert init(0, info, c_void_p()) == UNAVAIL
        assert all(word in error_text() for word in ("EI0019", "16666", "HCCL_NPU_SOCKET_PORT_RANGE")), error_text()
        os.environ["HCCL_NPU_SOCKET_PORT_RANGE"] = "16666,16667"
        os.environ["SOFTNPU_CONNECT_TIMEOUT"] = "1"
        assert init(0, root_info("third", root=1), c_void_p()) == TIMEOUT, error_text()  # a free port; nobody joins
        mark("over")
        return
    os.environ["SOFTNPU_CONNECT_TIMEOUT"] = "15"
    info = root_info("first")
    thread, _ = call_in_thread(
        lambda: call("HcclCommInitRootInfo", c_uint32(2), byref(info), c_uint32(0), byref(c_void_p()))
    )
    mark("connecting")
    await_mark("over")
    thread.join()


def npu_port_in_use() -> None:
    from ctypes import byref, c_uint32, c_void_p

    from tests.softnpu.hccl_c_api import call, refused, root_info, start

    start()
    with refused(UNAVAIL, "EI0019", "NPU 0"):
        call("HcclCommInitRootInfo", c_uint32(2), byref(root_info()), c_uint32(0), byref(c_void_p()))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
