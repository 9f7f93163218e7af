"""The fault suite's choice of cases."""

from __future__ import annotations

import re

import pytest

from tests.faults.plan import WHERE, Case, Fault, Phase, combinations, expected, one_case_per_kind
from vllm_ray_ascend.executor.diagnostics import hung_message, idle_message, late_message

pytestmark = pytest.mark.unit


def test_one_case_per_kind_is_there_once() -> None:
    kinds = [(case.fault, case.phase) for case in one_case_per_kind()]
    assert len(kinds) == len(set(kinds)) == sum(len(phases) for phases in WHERE.values())
    assert {fault for fault, _ in kinds} == set(Fault)


def test_a_seed_gives_the_same_cases_and_only_possible_ones() -> None:
    assert combinations(7, 50) == combinations(7, 50) != combinations(8, 50)
    assert all(case.phase in WHERE[case.fault] for case in combinations(7, 200))


def test_patterns_meet_our_messages() -> None:
    stopped = expected(Case(Fault.STOP, Phase.DECODE, 1, 2, 1))
    late = expected(Case(Fault.STOP, Phase.START, 1, 2, 1))
    assert stopped and re.search(stopped, hung_message("execute_model", 20, {0: "in HCCL", 1: None}))
    assert late and re.search(late, late_message("model", 20, [1], {0: "waiting", 1: None}))
    idle = expected(Case(Fault.STOP, Phase.IDLE, 1, 2, 1))
    assert idle and re.search(idle, idle_message(20, {0: "waiting for work", 1: None}))
    assert not re.search(stopped, "Executor failed.")
