"""hccl.communicator.Group: real processes, the real torch_npu, software NPUs.

Starting torch_npu takes longer than all scenarios together, so a few processes run every scenario.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.softnpu.ranks import Outcome, listed, run_ranks

PAIR = [
    "basic", "order", "missing_wait", "captured", "many", "large", "rejected", "aborted", "destroyed",
    "silent", "silent_send", "held", "wrong_size", "absent", "hanging_set_up", "late_set_up", "failed_call",
    "destroy_again", "twice_to_one", "copied", "no_memory", "late_first_call",
]  # fmt: skip
DEATH = "unseen_death"
FOUR = ["basic", "in_order", "late_rank", "killed_in_send", "killed_in_recv", "killed_in_collective"]
KILLED = FOUR[-3:]
Result = tuple[Path, list[Outcome]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("pair")
    variables = {"SOFTNPU_FAULTS": f"@{folder}/faults", "COUNT": "10000"}
    (folder / "faults").touch()
    return folder, run_ranks("group_worker", ",".join(PAIR), 2, folder, variables, limit=400)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("four")
    (folder / "faults").touch()
    return folder, run_ranks("group_worker", ",".join(FOUR), 4, folder, {"SOFTNPU_FAULTS": f"@{folder}/faults"})


def check_passed(result: Result, scenario: str, *ranks: int) -> None:
    for rank in ranks:
        path = result[0] / f"{scenario}.rank{rank}"
        assert path.exists(), listed(result[1])
        assert path.read_text() == "passed", path.read_text()


@pytest.mark.parametrize("scenario", PAIR)
def test_two_ranks(scenario: str, pair: Result) -> None:
    check_passed(pair, scenario, 0, 1)


@pytest.mark.parametrize("scenario", [name for name in FOUR if name not in KILLED])
def test_four_ranks(scenario: str, four: Result) -> None:
    check_passed(four, scenario, 0, 1, 2, 3)


@pytest.mark.parametrize(("scenario", "victim"), [(name, 1 + index) for index, name in enumerate(KILLED)])
def test_a_peer_is_killed(scenario: str, victim: int, four: Result) -> None:
    check_passed(four, scenario, 0)
    assert four[1][victim].code == -signal.SIGKILL


def test_a_death_is_seen_without_rank_0(tmp_path: Path) -> None:
    outcomes = run_ranks("group_worker", "first_leaves", 4, tmp_path)
    check_passed((tmp_path, outcomes), "first_leaves", 0, 1, 3)
    assert outcomes[2].code == -signal.SIGKILL


def test_a_death_that_hccl_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "faults").touch()
    outcomes = run_ranks("group_worker", DEATH, 2, tmp_path, {"SOFTNPU_FAULTS": f"@{tmp_path}/faults"})
    check_passed((tmp_path, outcomes), DEATH, 0)
    assert outcomes[1].code == -signal.SIGKILL
