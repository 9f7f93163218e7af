"""transport.hccl's Group: real processes, the real torch_npu, software NPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softnpu.ranks import run_ranks, succeeded

WORKER = "group_worker"


@pytest.mark.parametrize("ranks", [2, 3])
def test_types_shapes_and_collectives(ranks: int, tmp_path: Path) -> None:
    succeeded(run_ranks(WORKER, "basic", ranks, tmp_path))
