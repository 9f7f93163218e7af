"""transport.hccl's Group: real processes, the real torch_npu, software NPUs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.softnpu.ranks import run_ranks, succeeded

WORKER = "group_worker"


@pytest.mark.parametrize("ranks", [2, 3])
def test_types_shapes_and_collectives(ranks: int, tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "basic", ranks, tmp_path))


@pytest.mark.parametrize("scenario", ["order", "missing_wait", "aborted", "destroyed", "refused", "captured"])
def test_two_ranks(scenario: str, tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, scenario, 2, tmp_path))


@pytest.mark.parametrize("queue", ["1", "2"])
def test_a_bare_stream_has_what_torch_npus_queue_held(queue: str, tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "task_queue", 1, tmp_path, {"TASK_QUEUE_ENABLE": queue}))


@pytest.mark.parametrize("what", ["send", "recv", "collective"])
def test_a_peer_is_killed(what: str, tmp_path: Path) -> None:
    first, dead, *others = run_ranks(WORKER, f"killed_in_{what}", 3 if what == "collective" else 2, tmp_path)
    assert dead.code == -signal.SIGKILL
    succeeded([first, *others])


@pytest.mark.parametrize("scenario", ["silent", "silent_send"])
def test_a_peer_is_silent(scenario: str, tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, scenario, 2, tmp_path, {"SOFTNPU_FAULTS": "hccl_silent:rank=1"}))


def test_ranks_that_disagree(tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "wrong_size", 2, tmp_path))


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "absent", 1, tmp_path, {"HCCL_CONNECT_TIMEOUT": "2"}, size=2))


def test_many_random_sends(tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "many", 2, tmp_path, {"COUNT": "10000"}))


def test_a_large_tensor(tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "large", 2, tmp_path, {"SOFTNPU_MEMORY": "1G"}))
