"""Greedy tokens of whole engines on Ray equal those of Transformers on the CPU, however the model is spread out.

A text known by heart survives damage, so the log-probabilities of prompts that were never taught are compared too: one
lost all-reduce moves them by 0.3 or more (demo/models/README.md).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE, MOE
from demo.train.reference import Entry, stored_reference
from tests.e2e.conftest import run_generation

PROBE_TOLERANCE = 1e-3


class Case(NamedTuple):
    cluster: str
    tp: int
    pp: int
    eager: bool = False
    model: str = "dense"
    dtype: str = "float32"

    def __str__(self) -> str:
        mode = "eager" if self.eager else "graphs"
        return f"{self.model}-{self.dtype}-tp{self.tp}-pp{self.pp}-{self.cluster}-{mode}"


CASES = [
    Case("one_node", 2, 1, model="moe"),
]
"""TP x PP of the dense model on two nodes: tests/e2e/test_serve.py."""
SLOW = [
    Case("two_nodes_of_two", 2, 2),
    Case("one_node", 1, 1),
    Case("one_node", 2, 1),
    Case("one_node", 1, 2),
    Case("one_node", 2, 2),
    Case("one_node", 1, 1, model="moe"),
    Case("two_nodes_of_one", 2, 1),
    Case("two_nodes_of_one", 1, 2),
    Case("one_node", 1, 1, eager=True),
    Case("one_node", 2, 1, eager=True),
    Case("one_node", 1, 2, eager=True),
    Case("one_node", 2, 2, eager=True),
    Case("one_node", 2, 2, dtype="bfloat16"),
    Case("one_node", 1, 1, eager=True, model="moe"),
    Case("one_node", 2, 1, eager=True, model="moe"),
    Case("one_node", 2, 2, model="moe"),
    Case("two_nodes_of_one", 2, 1, eager=True),
    Case("two_nodes_of_one", 1, 2, eager=True),
    Case("two_nodes_of_two", 2, 2, eager=True),
    Case("two_nodes_of_two", 2, 2, model="moe"),
]


def check_generated(entries: list[Entry], results: list[dict[str, Any]], dtype: str) -> None:
    for entry, result in zip(entries, results, strict=True):
        if entry["kind"] == "probe" and dtype != "float32":
            continue
        assert result["tokens"] == entry["tokens"], f"{entry['kind']} {entry['prompt']!r}"
        if dtype == "float32":
            worst = max(abs(a - b) for a, b in zip(result["logprobs"], entry["logprobs"], strict=True))
            assert worst < PROBE_TOLERANCE, f"{entry['kind']} {entry['prompt']!r}: a log-probability is off by {worst}"


def check_workers(case: Case, facts: list[dict[str, Any]]) -> None:
    """Check that every worker is vllm-ascend's, on an NPU of its own, with HCCL groups."""
    assert [fact["rank"] for fact in facts] == list(range(case.tp * case.pp))
    assert len({(fact["node"], fact["physical"]) for fact in facts}) == len(facts)
    assert len({fact["node"] for fact in facts}) == (1 if case.cluster == "one_node" else 2)
    for fact in facts:
        assert "vllm_ascend.worker.worker.NPUWorker" in fact["classes"]
        assert fact["parameter_devices"] == ["npu"] and fact["cache_devices"] == ["npu"]
        assert fact["backends"] == {"tp": "hccl", "pp": "hccl"}
        assert fact["group_sizes"] == {"tp": case.tp, "pp": case.pp}


def check_replays(case: Case, batch: list[dict[str, Any]], end: list[dict[str, Any]]) -> None:
    """Check that batches beyond the captured sizes are decoded without graphs, single requests with them."""
    for before, after in zip(batch, end, strict=True):
        assert (after["replays"] > before["replays"]) is not case.eager
        if case.eager:
            assert after["replays"] == 0


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_tokens_equal_transformers(case: Case, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(case.cluster)
    model = DENSE if case.model == "dense" else MOE
    entries = stored_reference(model, case.dtype)
    short = sorted(range(len(entries)), key=lambda index: len(entries[index]["tokens"]))[:3]
    options = {
        "model": str(model),
        "tp": case.tp,
        "pp": case.pp,
        "eager": case.eager,
        "dtype": case.dtype,
        "singles": short,
    }
    result, log = run_generation(cluster, options)
    assert len(result["batch"]) == len(entries)
    check_generated(entries, result["batch"], case.dtype)
    check_generated([entries[index] for index in short], result["singles"], case.dtype)
    check_workers(case, result["facts"])
    check_replays(case, result["batch_facts"], result["facts"])
    check_start_line(log, case.tp * case.pp)


def check_start_line(log: str, ranks: int) -> None:
    """Check the log line of a successful startup, which the documentation describes."""
    lines = re.findall(r"vllm-ray-ascend \S+ ready: .*", log)
    assert len(lines) == 1, log[-3000:]
    assert [int(rank) for rank in re.findall(r"rank (\d+) ->", lines[0])] == list(range(ranks))
    for name in ("vLLM", "vllm-ascend", "Ray", "torch-npu"):
        assert name in lines[0]
