"""What the benchmark of message queues measures, and its tables."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.queues.plan import KIB, MIB, Case, Options, cases_of, read_options
from benchmarks.queues.report import markdown
from benchmarks.queues.ways import WAYS

pytestmark = pytest.mark.unit

MACHINE = {"cores": 2, "processor": "EPYC", "memory_gib": 24, "kernel": "6", "load_before": [0.5, 0, 0]}


def test_every_way_takes_each_turn_and_readers_expect_as_many_messages_as_are_sent() -> None:
    case = Case(Options.ways, 8, True, (KIB, 16 * MIB), 3)
    turns = list(case.turns())
    assert Counter((size, way) for _, size, way in turns) == {(size, way): 3 for size in case.sizes for way in WAYS}
    assert {way for number, size, way in turns if size == KIB and turns.index((number, size, way)) % 3 == 0} == set(
        WAYS
    )
    sent = sum(case.count_of(size) for _, size, way in turns if way == "pending")
    assert sent == case.messages_of_a_way()


def test_a_slow_reader_is_never_alone() -> None:
    cases = cases_of(read_options([]))
    assert [(case.readers, case.slow) for case in cases] == [(1, False), (8, False), (8, True), (64, False), (64, True)]


def test_tables_have_a_line_for_each_way() -> None:
    figures = {"call_s": [0.001, 0.003], "all_have_s": [0.002], "writer_cpu_s": 0.0005, "readers_cpu_s": 0.25}
    turns = [{"readers": 8, "slow": True, "size": MIB, "way": way, **figures} for way in WAYS]
    text = markdown({"commit": "abc", "date": "2026-11-28", "machine": MACHINE, "turns": turns})
    assert "| 8, one slow | zeromq | 2 (3) |" in text and text.count("| pending |") == 4
