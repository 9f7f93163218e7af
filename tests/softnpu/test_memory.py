"""Memory is the device's, not the process's: all processes of a node draw on it, and a dead one gives it back."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.softnpu.processes import check_python, start_python

MIB = 1 << 20

HOLDER = """
    import acl, ctypes, sys
    from tests.softnpu.runtime import runtime
    assert acl.rt.set_device(0) == 0
    address = ctypes.c_void_p()
    assert runtime().aclrtMalloc(ctypes.byref(address), ctypes.c_size_t(64 << 20), 0) == 0
    print("holding", flush=True)
    sys.stdin.readline()
"""


def wait_until(condition: Callable[[], bool], what: str, limit: float = 30) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def device() -> None:
    torch.npu.set_device(0)


def free_bytes(device: int = 0) -> int:
    return int(torch.npu.mem_get_info(device)[0])


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("ending", ["ends", "is killed"])
def test_memory_of_another_process_counts_until_it(ending: str) -> None:
    before, other_device = free_bytes(), free_bytes(1)
    with start_python(HOLDER) as holder:
        assert said(holder) == "holding"
        assert free_bytes() == before - 64 * MIB
        assert free_bytes(1) == other_device
        if ending == "is killed":
            holder.kill()
        else:
            holder.communicate("\n", timeout=30)
        holder.wait(30)
        wait_until(lambda: free_bytes() == before, "the memory of the other process is free again")


def test_freed_memory_is_free_for_all() -> None:
    torch.npu.synchronize()
    torch.npu.empty_cache()
    before = free_bytes()
    tensor = torch.empty(100 * MIB, dtype=torch.uint8, device="npu")
    assert before - free_bytes() >= 100 * MIB
    del tensor
    torch.npu.empty_cache()
    assert free_bytes() == before


def test_out_of_memory_reports_use_and_size() -> None:
    check_python(
        """
        import torch, torch_npu
        keep = torch.empty(40 << 20, dtype=torch.uint8, device="npu:0")
        try:
            torch.empty(40 << 20, dtype=torch.uint8, device="npu:0")
        except torch.OutOfMemoryError as error:
            text = str(error)
        assert "Tried to allocate 42.00 MiB" in text and "64.00 MiB total capacity" in text, text  # torch_npu rounds up
        other = torch.empty(40 << 20, dtype=torch.uint8, device="npu:1")  # a device of its own
        del keep
        torch.empty(60 << 20, dtype=torch.uint8, device="npu:0")  # the cache was given back for it
        assert torch.npu.mem_get_info(0)[1] == 64 << 20

        import ctypes
        from tests.softnpu.runtime import runtime, recent_error
        address = ctypes.c_void_p()
        torch.npu.set_device(1)
        assert runtime().aclrtMalloc(ctypes.byref(address), ctypes.c_size_t(40 << 20), 0) == 207001
        assert f"{40 << 20} bytes requested" in recent_error() and f"of {64 << 20} in use" in recent_error()
        """,
        SOFTNPU_MEMORY="64M",
    )


@pytest.mark.parametrize(("text", "size"), [("1.5G", 3 << 29), ("2m", 2 << 20), ("4194304", 4 << 20), (None, 1 << 30)])
def test_device_memory_setting(text: str | None, size: int) -> None:
    code = "import acl; acl.rt.set_device(0); print(acl.rt.get_mem_info(0)[1])"
    assert int(check_python(code, SOFTNPU_MEMORY=text)) == size


def _double_and_return(given: mp.Queue, returned: mp.Queue) -> None:
    torch.npu.set_device(0)
    tensor = given.get(timeout=60)
    tensor.mul_(2)
    mine = tensor + 1
    torch.npu.synchronize()
    returned.put(mine)
    given.get(timeout=60)  # the parent has done with `mine`, which lives here


def test_tensors_are_shared_between_processes_both_ways() -> None:
    context = mp.get_context("spawn")
    given, returned = context.Queue(), context.Queue()
    child = context.Process(target=_double_and_return, args=(given, returned), daemon=True)
    child.start()
    tensor = torch.arange(1000.0, device="npu")
    torch.npu.synchronize()
    given.put(tensor)
    theirs = returned.get(timeout=90)
    assert torch.equal(tensor.cpu(), torch.arange(1000.0) * 2)  # the child wrote into the parent's memory
    assert torch.equal(theirs.cpu(), torch.arange(1000.0) * 2 + 1)  # the parent reads the child's
    del theirs
    given.put(None)
    child.join(60)
    assert child.exitcode == 0


def test_expandable_segments() -> None:
    check_python(
        """
        import torch, torch_npu
        torch.npu.set_device(0)
        free = lambda: torch.npu.mem_get_info(0)[0]
        before = free()
        tensors = [torch.full((1 << 20,), float(n), device="npu") for n in range(30)]
        assert [t[-1].item() for t in tensors] == list(range(30))
        assert "expandable" in str(torch.npu.memory.memory_snapshot()) and before - free() >= 30 << 22
        del tensors[::2]
        tensors.append(torch.ones(12 << 20, device="npu"))
        assert tensors[-1].sum().item() == 12 << 20 and [t[0].item() for t in tensors[:-1]] == list(range(1, 30, 2))
        del tensors
        torch.npu.empty_cache()
        assert free() == before, (free(), before)
        """,
        PYTORCH_NPU_ALLOC_CONF="expandable_segments:True",
    )


def test_nothing_is_left_when_the_last_process_has_ended(tmp_path: Path) -> None:
    settings = {"SOFTNPU_STATE_DIR": str(tmp_path), "SOFTNPU_NODE": "left-behind"}
    with start_python(HOLDER, **settings) as killed, start_python(HOLDER, **settings) as last:
        assert said(killed) == said(last) == "holding"
        assert [path.name for path in tmp_path.iterdir()] == [f"softnpu-{os.getuid()}-left_behind"]
        killed.kill()
        killed.wait(30)
        last.communicate("\n", timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_forked_child_has_a_place_of_its_own_and_leaves_it(tmp_path: Path) -> None:
    check_python(
        """
        import acl, multiprocessing, os
        from pathlib import Path
        import torch_npu  # before the fork, as vLLM does; the device is first used behind it
        state = Path(os.environ["SOFTNPU_STATE_DIR"])

        def use() -> None:
            import torch
            assert torch.ones(3, device="npu").sum().item() == 3 and len(list(state.iterdir())) == 1

        child = multiprocessing.get_context("fork").Process(target=use)
        child.start()
        child.join()
        assert child.exitcode == 0 and not list(state.iterdir())
        """,
        SOFTNPU_STATE_DIR=str(tmp_path),
    )
