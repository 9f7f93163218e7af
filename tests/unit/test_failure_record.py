"""The record of a failure: a file in a folder, of which the last ones are kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from vllm_ray_ascend.control.server import Peer
from vllm_ray_ascend.executor.failure_record import KEPT, FailureRecord, create_record, write_to_folder

pytestmark = pytest.mark.unit


def make_record() -> FailureRecord:
    peer = Peer(3, 4700, "10.0.0.9", physical=1, log="/logs/worker.err", report="in execute_model for 1.2 s")
    return create_record("VRA-322", "VRA-322: it died", 0.5, [peer])


def test_a_record_says_what_each_rank_did(tmp_path: Path) -> None:
    record = make_record()
    path = write_to_folder(record, tmp_path / "ours")
    assert path is not None
    read = msgspec.json.decode(path.read_bytes(), type=FailureRecord)
    assert read == record and read.versions["vllm-ray-ascend"]
    (rank,) = read.ranks
    assert (rank.rank, rank.location, rank.report) == (3, "node 10.0.0.9, physical NPU 1", "in execute_model for 1.2 s")


def test_the_last_records_are_kept(tmp_path: Path) -> None:
    for second in range(KEPT + 3):
        write_to_folder(replace(make_record(), time=1795937000.0 + second), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == KEPT and names[0] == "failure-1795937003.000.json"


def test_no_folder_is_no_error(tmp_path: Path) -> None:
    assert write_to_folder(make_record(), tmp_path / "gone" / "deeper") is None
