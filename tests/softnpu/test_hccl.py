"""libhccl of the software NPU: real processes, the real torch_npu, namespaces of the kernel for nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.softnpu.ranks import Rank, run_ranks, succeeded

C_API, TORCH = "hccl_worker", "hccl_torch_worker"
KIND = {"SOFTNPU_STRICT": "-peer-death"}
"""For what the software NPU does where HCCL waits for ever: it names the rank that is gone."""
TWO_RANKS = ["grouped", "peer_leaves", "destroy_while_waiting", "mismatch"]


def on_nodes(ranks: int, nodes: int) -> list[Rank]:
    """Return ranks distributed over nodes which share this machine, but no memory."""
    return [Rank(rank, {"SOFTNPU_NODE": f"node{rank * nodes // ranks}"}) for rank in range(ranks)]


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Yield two network namespaces that reach each other."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare")
    names = [f"hccl{os.getpid()}{side}" for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("this machine forbids network namespaces")
            made.append(name)
        ends = [f"h{os.getpid() % 100000}{side}" for side in "ab"]
        command = f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"
        subprocess.run(["ip", *command.split()], check=True)
        for index, (name, end) in enumerate(zip(names, ends, strict=True)):
            for arguments in (f"address add 10.231.7.{index + 1}/24 dev {end}", f"link set {end} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *arguments.split()], check=True)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def inside(namespace: str) -> list[str]:
    """Return the command that runs another in a network namespace, with a /dev/shm of its own."""
    own_shm = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    return ["ip", "netns", "exec", namespace, "unshare", "--mount", "sh", "-c", own_shm, "sh"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_of_torch(ranks: int, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    succeeded(run_ranks(TORCH, "collectives", ranks, tmp_path))
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "hccl" in name]


def test_collectives_of_torch_between_namespaces(namespaces: list[str], tmp_path: Path) -> None:
    members = [Rank(rank, prefix=inside(namespaces[rank // 2])) for rank in range(4)]
    succeeded(run_ranks(TORCH, "collectives", members, tmp_path))


def test_killed_rank_ends_the_others(tmp_path: Path) -> None:
    *others, last = run_ranks(TORCH, "killed", 2, tmp_path, KIND)
    assert last.code == -signal.SIGKILL
    for other in others:
        assert other.code != 0 and "rank 1 (" in other.output and "is gone" in other.output, other.output


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_sizes_and_nothing_left(nodes: int, tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "basic", on_nodes(3, nodes), tmp_path))


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("scenario", TWO_RANKS)
def test_two_ranks(scenario: str, nodes: int, tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, scenario, on_nodes(2, nodes), tmp_path, KIND))


@pytest.mark.parametrize("nodes", [1, 2])
def test_sub_communicators(nodes: int, tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "sub_communicators", on_nodes(4, nodes), tmp_path))


@pytest.mark.parametrize("nodes", [1, 3])
def test_dead_peer(nodes: int, tmp_path: Path) -> None:
    first, dead, last = run_ranks(C_API, "dead_peer", on_nodes(3, nodes), tmp_path, KIND)
    assert dead.code == -signal.SIGKILL
    succeeded([first, last])


def test_nodes_without_common_processes(tmp_path: Path) -> None:
    """Equal node keys although the ranks cannot see each other's memory: they take the network."""
    probe = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids process namespaces")
    members = [Rank(0), Rank(1, prefix=probe)]
    for output in succeeded(run_ranks(C_API, "basic", members, tmp_path, {"SOFTNPU_LOG": "2"})):
        assert "sharing memory with 0 others" in output, output


def test_arguments(tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "arguments", 2, tmp_path))


def test_silent_peer(tmp_path: Path) -> None:
    variables = {"SOFTNPU_FAULTS": "hccl_silent:rank=1", "HCCL_EXEC_TIMEOUT": "3"}
    succeeded(run_ranks(C_API, "silent_peer", 3, tmp_path, variables))


def test_missing_rank(tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "missing_rank", [Rank(0), Rank(2)], tmp_path, {"SOFTNPU_CONNECT_TIMEOUT": "3"}, size=4))


def test_disagreement(tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "disagreement", 2, tmp_path))


def test_address_settings(tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "bad_address", 1, tmp_path))


def test_slow_link(tmp_path: Path) -> None:
    succeeded(run_ranks(C_API, "slow_link", on_nodes(2, 2), tmp_path, {"SOFTNPU_FAULTS": "slow_link:ms=50,mbps=40"}))
