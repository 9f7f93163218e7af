"""HCCL_HOST_SOCKET_PORT_RANGE on the software NPU. As a program, this file is one rank of such a test."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.softnpu.ranks import Rank, run_ranks, succeeded
from vllm_ray_ascend.environment.ports import port_variables

RANGE, BASE = "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"
PARA, UNAVAIL = 1, 7
BAD = ["61000-", "-61000", "61063-61000", "0-5", "61000-65536", "6100x", "61000,,61002", "61000,", "1 -2", "a", "AUTO",
       "61000-61010,61005", "61000,61000"]  # fmt: skip


def ports_of(rank: int) -> range:
    first, last = map(int, port_variables(50 + rank, 1.0, {})[RANGE].split("-"))  # far from those of running engines
    return range(first, last + 1)


def test_ranks_listen_in_their_own_windows(tmp_path: Path) -> None:
    ranks = [
        Rank(rank, {"SOFTNPU_NODE": f"node{rank}", BASE: "38440"} | port_variables(50 + rank, 1.0, {}))
        for rank in range(3)
    ]
    succeeded(run_ranks("test_hccl_ports", "windows", ranks, tmp_path))


@pytest.mark.parametrize("scenario", ["taken", "free", "bad"])
def test_settings(scenario: str, tmp_path: Path) -> None:
    succeeded(run_ranks("test_hccl_ports", scenario, 1, tmp_path, {"HCCL_SOCKET_IFNAME": "lo"}))


def windows() -> None:
    """Check that every connection between the ranks was accepted in the window of the lower one."""
    import numpy as np
    import psutil  # type: ignore[import-untyped]

    from tests.softnpu.hccl_c_api import RANK, SIZE, all_reduce, call, init, new_stream, start, synchronize

    start()
    stream, comm, data = new_stream(), init(), np.ones(3, dtype=np.float32)
    all_reduce(comm, stream, data)
    synchronize(stream)
    assert (data == SIZE).all()
    links = [link for link in psutil.Process().net_connections("tcp") if link.status == psutil.CONN_ESTABLISHED]
    accepted = [link for link in links if link.laddr.port in ports_of(RANK)]
    called = {rank for rank in range(RANK) for link in links if link.raddr.port in ports_of(rank)}
    assert len(accepted) == SIZE - 1 - RANK and len(called) == RANK, links
    call("HcclBarrier", comm, stream)
    synchronize(stream)
    call("HcclCommDestroy", comm)


def listening(stack: ExitStack) -> int:
    """Return a port of loopback that is taken until the stack ends."""
    return int(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])


def root_port(name: str) -> int:
    """Return the port on which a root of a communicator listens: the last field of the software NPU's root info."""
    from tests.softnpu.hccl_c_api import root_info

    info = bytes(root_info(name))
    (length,) = struct.unpack_from("=I", info, 12)
    return int(struct.unpack_from("=H", info, 16 + length)[0])


def taken() -> None:
    """Check that no port outside the range is used, and that the error names the remedy."""
    from tests.softnpu.hccl_c_api import refused, root_info, start

    start()
    with ExitStack() as stack:
        setting = f"{listening(stack)},{listening(stack)}"
        os.environ |= {RANGE: setting, BASE: "38440"}
        with refused(UNAVAIL, f"{RANGE}={setting}: no port of it", "127.0.0.1", "Address already in use", "widen the"):
            root_info("root")


def free() -> None:
    """Check that a free port is found in every part of the range; auto lets the operating system choose."""
    from tests.softnpu.hccl_c_api import start

    start()
    with ExitStack() as stack:
        port, window = listening(stack), ports_of(0)
        os.environ[RANGE] = f"{port},{window[0]}-{window[-1]}"
        assert root_port("part") in window
    os.environ |= {RANGE: "auto", BASE: str(window[0])}
    assert root_port("auto") not in window


def bad() -> None:
    """Check that the error names an invalid value."""
    from tests.softnpu.hccl_c_api import refused, root_info, start

    start()
    for number, setting in enumerate(BAD):
        os.environ[RANGE] = setting
        with refused(PARA, f"{RANGE}={setting} is neither auto nor ports", "61000-61063"):
            root_info(str(number))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
