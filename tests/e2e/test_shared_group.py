"""Engines in a placement group of the user: each on its own NPUs, its own part of one, or in bundles of its order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE, PROMPTS, zen_after
from tests.e2e.conftest import run_on_head
from tests.e2e.generate import MARKER
from tests.e2e.test_bad_input import check_nothing_left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "share", "indices", "expected"),
    [
        (2, "1", ("0,1", "2,3"), [[0, 1], [2, 3]]),
        (1, "0.5", ("0", "0"), [[0], [0]]),
    ],
    ids=["TP 2 each", "half an NPU each"],
)
def test_two_engines(
    one_node: Cluster, tp: int, share: str, indices: tuple[str, str], expected: list[list[int]]
) -> None:
    result = run_engines(one_node, tp, share, *indices)
    assert sorted(sorted(fact["physical"] for fact in facts) for facts in result["facts"]) == expected
    assert result["text"] == [zen_after(PROMPTS[-1])] * 2
    check_nothing_left(one_node)


@pytest.mark.slow
def test_ranks_are_in_the_bundles_that_the_user_names_in_reversed_order(two_nodes_of_one: Cluster) -> None:
    """Each bundle is on a node of its own, so that a worker's node identifies its bundle."""
    result = run_engines(two_nodes_of_one, 2, "1", "1,0")
    (engine,), (facts,), addresses = result["engines"], result["facts"], result["bundle_addresses"]
    assert len(set(addresses)) == 2
    ranks = [(rank["rank"], rank["bundle"], rank["address"], rank["pid"]) for rank in engine["ranks"]]
    assert ranks == [(rank, 1 - rank, addresses[1 - rank], facts[rank]["pid"]) for rank in (0, 1)]
    own_addresses = {node.hostname: node.address for node in two_nodes_of_one.nodes}
    found = [(fact["rank"], own_addresses[fact["node"]]) for fact in facts]
    assert found == [(rank, addresses[1 - rank]) for rank in (0, 1)], "as the workers themselves see it"
    assert result["text"] == [zen_after(PROMPTS[-1])]
    check_nothing_left(two_nodes_of_one)


def run_engines(cluster: Cluster, tp: int, share: str, *indices: str) -> dict[str, Any]:
    """Return what tests.e2e.shared_group reports of engines, one for each of the ``indices``."""
    done = run_on_head(cluster, "-m", "tests.e2e.shared_group", str(DENSE), str(tp), share, *indices)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and found, (done.stdout + done.stderr)[-5000:]
    result: dict[str, Any] = json.loads(found[-1].removeprefix(MARKER))
    return result


@pytest.mark.slow
def test_the_same_bundles_for_both_are_rejected(one_node: Cluster) -> None:
    """Without our check the second engine would wait forever for the NPUs of the first."""
    done = run_on_head(one_node, "-m", "tests.e2e.shared_group", str(DENSE), "1", "1", "1", "1")
    assert done.returncode != 0
    assert (
        "ShortageError: VRA-226: Bundles of the placement group are held by another engine (bundle 1 has 0 NPU free; a "
        "worker takes 1). Free are 0; use these: VLLM_RAY_BUNDLE_INDICES=0"
    ) in done.stderr
    check_nothing_left(one_node)
