"""Which devices a process sees, and under which numbers: as CANN reads ASCEND_RT_VISIBLE_DEVICES."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from softnpu.errors import SoftNpuError

from softnpu import activate
from tests.softnpu.processes import check_python, run_python

# Physical ids in the order of the visible ones, from two functions of the runtime.
PHYSICAL_IDS = """
    import acl, ctypes, json
    from tests.softnpu.runtime import runtime
    ids = []
    for visible in range(acl.rt.get_device_count()[0]):
        physical, uuid = ctypes.c_int32(), ctypes.create_string_buffer(64)
        assert runtime().aclrtGetLogicDevIdByUserDevId(visible, ctypes.byref(physical)) == 0
        assert runtime().aclrtDeviceGetUuid(visible, uuid) == 0
        assert uuid.value.decode().endswith(f"-{physical.value}"), uuid.value
        ids.append(physical.value)
    print(json.dumps(ids))
"""


def test_an_npu_has_one_uuid_in_a_cluster() -> None:
    code = """
        import acl, ctypes
        from tests.softnpu.runtime import runtime
        uuid = ctypes.create_string_buffer(64)
        assert runtime().aclrtDeviceGetUuid(0, uuid) == 0
        print(uuid.value.decode())
    """
    same, again, other = (check_python(code, SOFTNPU_NODE=node) for node in ("uuid-a", "uuid-a", "uuid-b"))
    assert same == again != other


def physical_ids(visible: str | None, **environment: str | None) -> list[int]:
    text = check_python(PHYSICAL_IDS, ASCEND_RT_VISIBLE_DEVICES=visible, **environment)
    return [int(entry) for entry in text.strip(" []\n").split(",") if entry]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        pytest.param(None, [0, 1, 2, 3, 4, 5, 6, 7], id="unset"),
        pytest.param("", [], id="empty"),
        pytest.param("0,1,2", [0, 1, 2], id="plain"),
        pytest.param("6,2,4", [6, 2, 4], id="order kept"),
        pytest.param(" 3 , 1 ", [3, 1], id="spaces"),
        pytest.param("1,2,1,3", [1, 2], id="stops at a duplicate"),
        pytest.param("1,,3", [1], id="stops at a blank"),
        pytest.param("1,-2,3", [1], id="stops at a negative"),
        pytest.param("1,x,3", [1], id="stops at a word"),
        pytest.param("1,2x,3", [1], id="stops at half a number"),
        pytest.param("7,8,0", [7], id="stops behind the last device"),
        pytest.param("-1", [], id="nothing valid"),
        pytest.param("5,", [5], id="comma at the end"),
    ],
)
def test_visible_devices(visible: str | None, expected: list[int]) -> None:
    assert physical_ids(visible) == expected


def test_number_of_devices() -> None:
    assert physical_ids(None, SOFTNPU_DEVICES="3") == [0, 1, 2]
    assert physical_ids("2,3", SOFTNPU_DEVICES="3") == [2]
    assert physical_ids(None, SOFTNPU_DEVICES="0") == []


def test_torch_sees_the_visible_devices_only() -> None:
    check_python(
        """
        import torch, torch_npu
        assert torch.npu.device_count() == 2 and torch.npu.get_device_name(0) == "Ascend910B1"
        assert (torch.ones(3, device="npu:1") + 1).cpu().tolist() == [2.0] * 3
        try:
            torch.npu.set_device(2)
        except RuntimeError as error:
            assert "device 2 is not among the 2 visible devices (ASCEND_RT_VISIBLE_DEVICES=5,3" in str(error), error
        else:
            raise SystemExit("device 2 of 2 was set")
        """,
        ASCEND_RT_VISIBLE_DEVICES="5,3",
    )


def test_devices_have_memory_and_streams_of_their_own() -> None:
    first, second = torch.ones(4, device="npu:0"), torch.full((4,), 2.0, device="npu:1")
    moved = first.to("npu:1")
    assert moved.device.index == 1
    assert (moved + second).cpu().tolist() == [3.0] * 4
    first.add_(1)
    assert moved.cpu().tolist() == [1.0] * 4
    second.copy_(first)
    assert second.cpu().tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("name", "value", "call"),
    [
        ("SOFTNPU_DEVICES", "65", "acl.rt.get_device_count()"),
        ("SOFTNPU_DEVICES", "two", "acl.rt.get_device_count()"),
        ("SOFTNPU_MEMORY", "lots", "acl.rt.set_device(0), acl.rt.get_mem_info(0)"),
        ("SOFTNPU_MEMORY", "-1G", "acl.rt.set_device(0), acl.rt.get_mem_info(0)"),
        ("SOFTNPU_MEMORY", "1Gig", "acl.rt.set_device(0), acl.rt.get_mem_info(0)"),
        ("SOFTNPU_STATE_DIR", "/proc/none", "acl.rt.set_device(0)"),
        ("SOFTNPU_LOG", "4", "acl.rt.set_device(99)"),
    ],
)
def test_bad_setting_ends_the_process_and_is_named(name: str, value: str, call: str) -> None:
    done = run_python(f"import acl; {call}", **{name: value})
    assert done.returncode != 0
    assert name in done.stderr
    assert value in done.stderr


def test_ray_finds_the_devices_by_itself() -> None:
    check_python(
        """
        from ray._private.accelerators.npu import NPUAcceleratorManager as npu
        assert npu.get_current_node_num_accelerators() == 4
        assert npu.get_current_node_accelerator_type() == "Ascend910B1"
        """,
        SOFTNPU_DEVICES="4",
    )


def test_activation_refuses_a_real_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.mkdir()
    monkeypatch.setattr(activate, "REAL_DRIVER", (tmp_path / "absent", driver))
    with pytest.raises(SoftNpuError, match=f"real Ascend driver .{driver} exists"):
        activate.make_environment(os.environ)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_runtime_refuses_a_real_driver() -> None:
    if Path(os.environ["SOFTNPU_LIB"]).is_relative_to("/usr/local") or Path(sys.prefix).is_relative_to("/usr/local"):
        pytest.skip("Python or the libraries lie where the driver is put")
    look = "from tests.softnpu.runtime import runtime, recent_error; print(runtime().aclInit(None), recent_error())"
    script = (
        f"mount -t tmpfs tmpfs /usr/local && mkdir -p /usr/local/Ascend/driver && exec {sys.executable} -c '{look}'"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("507033 a real Ascend driver is present"), done
