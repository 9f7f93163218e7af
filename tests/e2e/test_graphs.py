"""Captures that fail in whole engines: all ranks fall back alike, graphs are released and captured again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE
from tests.e2e.conftest import run_on_head
from tests.e2e.generate import MARKER
from tests.e2e.servers import check_text, create_server, opened_npus_by_node, temporary_cluster

SIZES = [1, 2, 4, 8]
BEFORE = 34
"""Streams that a worker of TP 2 holds before it captures: torch_npu's own."""
OF_A_GRAPH = 3
"""That it is captured on, and two for the communicator of tensor parallelism."""


@contextmanager
def node(name: str, settings: Mapping[str, str]) -> Iterator[Cluster]:
    with temporary_cluster(f"graphs-{name}", 1, 2, settings={1: settings}) as cluster:
        yield cluster


def run(cluster: Cluster, *stages: str, **variables: str) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the result of tests.e2e.capture (None: it failed), and its whole log."""
    options = {"model": str(DENSE), "tp": 2, "sizes": SIZES, "stages": stages}
    done = run_on_head(cluster, "-m", "tests.e2e.capture", json.dumps(options), **variables)
    log = done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    if done.returncode != 0 or not found:
        return None, log
    records: list[dict[str, Any]] = json.loads(found[-1][len(MARKER) :])
    return records, log


def check(record: dict[str, Any], sizes: list[int], mode: str = "FULL_DECODE_ONLY") -> None:
    """Check that both workers have graphs of these sizes, hold only their streams, and generate the right text."""
    assert record["right"], record
    for worker in record["workers"]:
        assert (worker["sizes"], worker["mode"]) == (sizes, mode)
        assert worker["streams"] == BEFORE + OF_A_GRAPH * len(sizes)
        assert bool(worker["replays"]) is bool(sizes) or record["stage"] != "start"


@pytest.mark.slow  # the same fallback, with two workers and no engine: tests/softnpu/test_graph_steps.py
def test_ranks_fall_back_together_and_capture_again() -> None:
    """Streams for three graphs; then rank 1 alone fails at its second of those."""
    budget = BEFORE + 3 * OF_A_GRAPH + 1
    with node("steps", {"SOFTNPU_STREAMS": str(budget), "SOFTNPU_FAULTS": "capture:device=1,nth=5"}) as cluster:
        records, log = run(cluster, "release_graphs", "recapture_graphs")
    assert records is not None, log[-6000:]
    start, released, again = records
    check(start, [8])
    check(released, [])
    check(again, [8])
    first, second = re.findall(r"ACL graphs: size .*? Stepping down: .*?\.", log)
    assert "with 3 of 4 graphs captured" in first and "has 1 streams left, and such a graph takes 3" in first
    assert "kept 3 of 4: 1, 4, 8" in first
    assert "with 1 of 3 graphs captured: rank 1:" in second and "kept 1 of 4: 8" in second


@pytest.mark.slow
def test_compiled_code_is_for_the_device_of_its_worker(tmp_path: Path) -> None:
    """The ranks of a second engine on a node have other NPUs than those of the first, and the same cache."""
    captured = json.dumps({"cudagraph_capture_sizes": [1, 2]})
    options = ("--distributed-executor-backend", "ray", "--no-enforce-eager", "--compilation-config", captured)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    with temporary_cluster("graphs-two", 1, 4) as cluster, ExitStack() as stack:
        for number in (1, 2):
            server = stack.enter_context(create_server(cluster, DENSE, tmp_path / f"log{number}", *options, **cache))
            server.wait_until_healthy()
            check_text(server, DENSE, 1)
        assert opened_npus_by_node(cluster) == {1: [0, 1, 2, 3]}
