"""Faults that SOFTNPU_FAULTS asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softnpu.processes import check_python, run_python


def test_device_that_does_not_open() -> None:
    check_python(
        """
        import acl
        from tests.softnpu.runtime import recent_error
        assert [acl.rt.set_device(visible) for visible in range(3)] == [0, 507033, 0]
        acl.rt.set_device(1)
        assert "NPU 5 does not open" in recent_error() and "SOFTNPU_FAULTS" in recent_error(), recent_error()
        assert acl.rt.get_device()[0] == 2  # a failed call changes nothing
        """,
        SOFTNPU_FAULTS="open_device:device=5",
        ASCEND_RT_VISIBLE_DEVICES="4,5,6",
    )


def test_torch_reports_a_device_that_does_not_open() -> None:
    check_python(
        """
        import torch, torch_npu
        assert torch.ones(2, device="npu:0").sum().item() == 2
        try:
            torch.ones(2, device="npu:1")
        except RuntimeError as error:
            assert "NPU 1 does not open" in str(error), error
        else:
            raise SystemExit("device 1 opened")
        """,
        SOFTNPU_FAULTS="open_device:device=1",
    )


@pytest.mark.parametrize("expandable", ["True", "False"])
def test_torch_runs_out_of_memory(tmp_path: Path, expandable: str) -> None:
    """Also with segments that grow, as vllm-ascend has them, whose memory comes from another function of CANN's."""
    file = tmp_path / "faults"
    check_python(
        f"""
        import torch, torch_npu
        from pathlib import Path
        kept = torch.ones(2, device="npu:0")
        Path({str(file)!r}).write_text("no_memory:device=0")
        try:
            torch.empty(64 << 20, dtype=torch.uint8, device="npu:0")
        except torch.OutOfMemoryError:
            pass
        else:
            raise SystemExit("there was memory")
        assert kept.sum().item() == 2
        assert torch.empty(64 << 20, dtype=torch.uint8, device="npu:1").numel() == 64 << 20
        """,
        SOFTNPU_FAULTS=f"@{file}",
        PYTORCH_NPU_ALLOC_CONF=f"expandable_segments:{expandable}",
    )


def test_faults_of_a_file_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    check_python(
        f"""
        import acl
        from pathlib import Path
        file = Path({str(file)!r})
        assert acl.rt.set_device(0) == 0  # there is no file yet
        file.write_text("open_device:device=0")
        assert acl.rt.set_device(0) == 507033 and acl.rt.set_device(1) == 0
        file.write_text("open_device:device=1; open_device:device=2")
        assert [acl.rt.set_device(device) for device in range(3)] == [0, 507033, 507033]
        file.unlink()
        assert [acl.rt.set_device(device) for device in range(3)] == [0, 0, 0]
        """,
        SOFTNPU_FAULTS=f"@{file}",
    )


def test_only_the_nth_time_and_from_then_on() -> None:
    check_python(
        """
        import acl
        assert [acl.rt.set_device(0) for _ in range(4)] == [0, 0, 507033, 0]
        assert [acl.rt.set_device(1) for _ in range(4)] == [0, 0, 507033, 507033]
        """,
        SOFTNPU_FAULTS="open_device:device=0,nth=3;open_device:device=1,after=2",
    )


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ("open_devcie:device=0", '"open_devcie" is no fault; there are capture destroy_again'),
        ("open_device:devcie=0", 'open_device has no "devcie"; it has device nth after'),
        ("hccl_silent=rank:1", '"hccl_silent=rank" is no fault'),
        ("hccl_silent:rank", 'hccl_silent: "rank" has no value'),
    ],
)
def test_a_misspelt_fault_is_refused(faults: str, reason: str) -> None:
    """A test would wait for a fault that never comes."""
    code = "import acl\nraise SystemExit(acl.rt.set_device(0) != 0)"
    done = run_python(code, SOFTNPU_FAULTS=faults, SOFTNPU_LOG="0")
    assert done.returncode == 1 and f"SOFTNPU_FAULTS: {reason}" in done.stderr, done.stderr


def test_a_misspelt_fault_in_a_file_that_changes_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "faults"
    code = f"""
        import ctypes, acl
        from tests.softnpu.runtime import runtime
        assert acl.rt.set_device(0) == 0
        open({str(path)!r}, "w").write("no_memroy:device=0")
        runtime().aclrtMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1 << 20), 0)
    """
    path.write_text("")
    done = run_python(code, SOFTNPU_FAULTS=f"@{path}")
    assert done.returncode < 0 and '"no_memroy" is no fault' in done.stderr, done.stderr
