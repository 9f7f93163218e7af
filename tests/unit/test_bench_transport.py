"""What the transport benchmark computes from what it measured, without measuring."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.statistics import Sample, figures
from benchmarks.transport.methods import WAYS as MADE
from benchmarks.transport.options import BASE, CASES, EMPTY, MIB, SIZES, WAYS, count_of, label, read_options
from benchmarks.transport.report import markdown

pytestmark = pytest.mark.unit


def test_sizes() -> None:
    assert (label(SIZES[0]), label(SIZES[-1])) == ("4 KiB", "256 MiB")
    assert [count_of(size) for size in (SIZES[0], 8 * MIB, SIZES[-1])] == [40, 8, 3]


def test_every_way_can_be_made() -> None:
    assert tuple(MADE) == (*WAYS, *EMPTY.values())


def test_options() -> None:
    assert read_options([]).cases == tuple(CASES)
    quick = read_options(["--quick", "--ways", "raw", "group", "--sizes", "4096"])
    assert (quick.cases, quick.ways, quick.sizes, quick.rounds) == (("one-node",), ("raw", "group"), (4096,), 2)


def run_of(ways: list[str], left_out: dict[str, str]) -> dict[str, Any]:
    return {
        "machine": {"processor": "P", "cores": 2, "memory_gib": 24, "kernel": "6", "load_before": [0.5]},
        "versions": {"ray": "2.60.0"},
        "commit": "abc",
        "began": "now",
        "seconds": 60,
        "options": {"name": "n", "cases": ["one-node"], "ways": ways, "sizes": [MIB]},
        "left_out": left_out,
    }


def test_a_table_with_a_gap() -> None:
    run = run_of(["raw", "group", "direct"], {"one-node, direct": "no reason"})
    samples = [
        Sample("one-node", BASE, "1 MiB", 0, [0.001]),
        Sample("one-node", "group", "1 MiB", 0, [0.002]),
        Sample("one-node", BASE, "1 MiB", 1, [0.003]),
        Sample("one-node", "group", "1 MiB", 1, [0.003]),
    ]
    text = markdown(run, figures(samples, BASE))
    assert "| 1 MiB | 2 ms (2.98 ms), 524 MB/s | 2.5 ms (2.99 ms), 419 MB/s, **0.67** [0.50, 1.00] |  |" in text
    assert "Left out: one-node, direct: no reason" in text


def test_what_a_hop_costs_beyond_ray_and_the_transfer() -> None:
    run = run_of(["raw", "direct", "direct-empty"], {})
    seconds = {BASE: 0.001, "direct": 0.0055, "direct-empty": 0.004, "graph-hccl": 0.001}
    samples = [Sample("one-node", way, "1 MiB", 0, [value]) for way, value in seconds.items()]
    text = markdown(run, figures(samples, BASE))
    assert "| 1 MiB | direct | 5.5 ms | 4 ms | 1 ms | 500 µs |" in text
    assert "| 1 MiB | graph-hccl |" not in text  # without its empty way
