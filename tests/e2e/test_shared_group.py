"""Two engines on one node in one placement group: each on its own NPUs, or on its own part of one."""

from __future__ import annotations

import json

import pytest

from demo.train.recitation import DENSE, PROMPTS, zen_after
from tests.e2e.conftest import on_head
from tests.e2e.generate import MARKER
from tests.e2e.test_bad_input import check_nothing_left
from vllm_ray_ascend.softnpu.cluster.plan import Cluster


@pytest.mark.parametrize(
    ("tp", "share", "indices", "expected"),
    [
        (2, "1", ("0,1", "2,3"), [[0, 1], [2, 3]]),
        pytest.param(1, "0.5", ("0", "0"), [[0], [0]], marks=pytest.mark.slow),
    ],
    ids=["TP 2 each", "half an NPU each"],
)
def test_two_engines(
    one_node: Cluster, tp: int, share: str, indices: tuple[str, str], expected: list[list[int]]
) -> None:
    done = on_head(one_node, "-m", "tests.e2e.shared_group", str(DENSE), str(tp), share, *indices)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and found, (done.stdout + done.stderr)[-5000:]
    result = json.loads(found[-1].removeprefix(MARKER))
    assert sorted(map(sorted, result["physical"])) == expected
    assert result["text"] == [zen_after(PROMPTS[-1])] * 2
    check_nothing_left(one_node)


def test_the_same_bundles_for_both_are_refused(one_node: Cluster) -> None:
    """Without an answer from us the second engine would wait for ever for the NPUs of the first."""
    done = on_head(one_node, "-m", "tests.e2e.shared_group", str(DENSE), "1", "1", "1", "1")
    assert done.returncode != 0
    assert (
        "ShortageError: Bundles of the placement group are held by another engine (bundle 1 has 0 NPU free; a worker "
        "takes 1). Free are 0; use such: VLLM_RAY_BUNDLE_INDICES=0"
    ) in done.stderr
    check_nothing_left(one_node)
