"""The direct transport's links between real processes on software NPUs, without Ray; with Ray: test_direct_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softnpu.ranks import Rank, listed, run_ranks, succeeded

WORKER = "direct_worker"


def test_links_of_two(tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "at_once,producer_is_waited_for,aborted,idle,wrong_token", 2, tmp_path))


def test_objects_of_all_kinds_to_two_and_a_sender_that_dies(tmp_path: Path) -> None:
    outcomes = run_ranks(WORKER, "basic,sender_killed", 3, tmp_path)
    assert [each.code for each in outcomes] == [-9, 0, 0], listed(outcomes)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_in_a_transfer(victim: int, tmp_path: Path) -> None:
    outcomes = run_ranks(WORKER, "killed_in_transfer", 2, tmp_path, {"VICTIM": str(victim)})
    assert [each.code for each in outcomes] == [-9 if rank == victim else 0 for rank in range(2)], listed(outcomes)


def test_a_silent_sender(tmp_path: Path) -> None:
    faults = Rank(0, {"SOFTNPU_FAULTS": "hccl_silent:rank=0"})
    succeeded(run_ranks(WORKER, "silent", [faults, Rank(1)], tmp_path))
