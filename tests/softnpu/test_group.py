"""transport.hccl's Group: real processes, the real torch_npu, software NPUs.

Starting torch_npu takes longer than all that is tested, so a few processes run every scenario.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.softnpu.ranks import Outcome, listed, run_ranks

PAIR = [
    "basic", "order", "missing_wait", "captured", "many", "large", "refused", "aborted", "destroyed",
    "silent", "silent_send", "held", "wrong_size", "absent",
]  # fmt: skip
FOUR = ["basic", "killed_in_send", "killed_in_recv", "killed_in_collective"]
Told = tuple[Path, list[Outcome]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("pair")
    variables = {"SOFTNPU_FAULTS": f"@{folder}/faults", "COUNT": "10000"}
    (folder / "faults").touch()
    return folder, run_ranks("group_worker", ",".join(PAIR), 2, folder, variables, limit=400)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("four")
    return folder, run_ranks("group_worker", ",".join(FOUR), 4, folder)


def passed(told: Told, scenario: str, *ranks: int) -> None:
    for rank in ranks:
        path = told[0] / f"{scenario}.rank{rank}"
        assert path.exists(), listed(told[1])
        assert path.read_text() == "passed", path.read_text()


@pytest.mark.parametrize("scenario", PAIR)
def test_two_ranks(scenario: str, pair: Told) -> None:
    passed(pair, scenario, 0, 1)


def test_four_ranks(four: Told) -> None:
    passed(four, "basic", 0, 1, 2, 3)


@pytest.mark.parametrize(("scenario", "victim"), [(name, 1 + index) for index, name in enumerate(FOUR[1:])])
def test_a_peer_is_killed(scenario: str, victim: int, four: Told) -> None:
    passed(four, scenario, 0)
    assert four[1][victim].code == -signal.SIGKILL
