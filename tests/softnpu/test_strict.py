"""Rules of CANN that the software NPU enforces, each in a process of its own, with the page or source it comes from.

"Page" is a page of CANN's API reference, "runtime" CANN's open runtime (hicann/runtime, tag v8.5.0), "torch_npu" its
sources at v26.2.0-0day-pytorch2.13.0. The rules' names are those of SOFTNPU_STRICT.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.softnpu.processes import check_python, run_python
from tests.softnpu.runtime import (
    BAD_ARGUMENT,
    CAPTURE_GLOBAL,
    CAPTURE_RELAXED,
    CONTINUE_ON_FAILURE,
    DEVICE_ERROR,
    EVENT_TIMEOUT,
    FORBIDDEN_IN_CAPTURE,
    NO_CONTEXT,
    NOT_SUPPORTED,
    NULL_STREAM_IN_CAPTURE,
    OK,
    OTHER_CONTEXT,
    RESET_TOO_OFTEN,
    STOP_ON_FAILURE,
    STREAM_CAPTURED,
    SYNC_TIMEOUT,
)

MEMSET_FAILS = "device_error:device=0,task=memset"
RULES = [
    *("context-stop", "link-setup", "async-error", "connect-timeout", "unlimited-waits", "default-device"),
    *("capture-pageable", "capture-null-stream", "destroy-again", "batch-one-item-per-peer", "host-register-zero"),
    *("reset-device", "npu-ports", "receiver-first", "stream-context", "peer-death", "zero-bytes"),
]
START = """
import acl, ctypes, os
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from tests.softnpu.runtime import RawStream, recent_error, runtime
"""


def check(code: str, **environment: str | None) -> str:
    return check_python(START + code, **environment)


# ---- SOFTNPU_STRICT


@pytest.mark.parametrize("setting", ["-no-such-rule", "context-stop", "2", "-link-setup,-nothing"])
def test_a_setting_that_names_no_rule_opens_no_device(setting: str) -> None:
    done = run_python(
        "import acl\nraise SystemExit(acl.rt.set_device(0) != 0)", SOFTNPU_STRICT=setting, SOFTNPU_LOG="0"
    )
    assert done.returncode == 1
    assert f"SOFTNPU_STRICT={setting}" in done.stderr and all(rule in done.stderr for rule in RULES), done.stderr


@pytest.mark.parametrize("setting", ["", "0", "1", ",".join(f"-{rule}" for rule in RULES)])
def test_every_rule_can_be_named(setting: str) -> None:
    check_python("import acl\nassert acl.rt.set_device(0) == 0", SOFTNPU_STRICT=setting)


# ---- context-stop
# Page aclrtSetStreamFailureMode: after a failure in stop mode no new task is taken, and on A2 and A3 the mode of one
# stream is that of all streams of its context. Runtime: Context::CheckStatus and CheckTaskSend, asked by submissions,
# stream and event synchronisation and queries; torch_npu, AclInterface.cpp: every stream it creates is set to stop.

TWO_STREAMS = f"""
assert acl.rt.set_device(0) == 0
bad, other = RawStream(), RawStream()
assert bad.set_failure_mode({STOP_ON_FAILURE}) == 0
event = other.record()  # behind the closed gate
other.note(1)
bad.fail()
bad.note(2)
bad.open()
"""


def test_a_failed_task_stops_every_stream_of_its_context() -> None:
    check(
        TWO_STREAMS
        + f"""
assert bad.synchronize() == {DEVICE_ERROR}
assert "the context of device 0 has stopped: memset" in recent_error() and "SOFTNPU_FAULTS" in recent_error()
buffer, status, data = (ctypes.c_byte * 8)(), c_int(7), c_size_t(8)
host = {{
    "synchronise the other stream": lambda: other.synchronize(),
    "without a limit": lambda: runtime().aclrtSynchronizeStream(other.handle),
    "synchronise the event": lambda: runtime().aclrtSynchronizeEvent(event),
    "synchronise the device": lambda: runtime().aclrtSynchronizeDevice(),
    "query the stream": lambda: runtime().aclrtStreamQuery(other.handle, byref(status)),
    "query the event": lambda: runtime().aclrtQueryEventStatus(event, byref(status)),
    "record": lambda: runtime().aclrtRecordEvent(event, other.handle),
    "wait": lambda: runtime().aclrtStreamWaitEvent(other.handle, event),
    "copy": lambda: runtime().aclrtMemcpyAsync(buffer, data, buffer, data, c_int(3), other.handle),
    "memset": lambda: runtime().aclrtMemsetAsync(buffer, data, c_int(0), data, other.handle),
    "host function": lambda: runtime().aclrtLaunchHostFunc(other.handle, None, None),
    "the default stream": lambda: runtime().aclrtMemsetAsync(buffer, data, c_int(0), data, None),
}}
codes = {{name: call() for name, call in host.items()}}
assert set(codes.values()) == {{{DEVICE_ERROR}}}, codes
status = c_int(7)
assert runtime().aclrtQueryEventStatus(event, byref(status)) and status.value == 0  # not ready
other.open()
assert runtime().aclrtDestroyStream(other.handle) == 0 and runtime().aclrtDestroyStream(bad.handle) == 0
assert other.seen == bad.seen == []
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
    )


def test_another_device_of_the_process_goes_on() -> None:
    check(
        TWO_STREAMS
        + f"""
assert bad.synchronize() == {DEVICE_ERROR}
assert acl.rt.set_device(1) == 0
healthy = RawStream()
healthy.note(3)
healthy.open()
assert healthy.synchronize() == 0 and healthy.seen == [3]
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
    )


def test_a_stream_that_waits_for_the_failed_one_ends() -> None:
    """And the limit of waits has no part in it."""
    waits = """
waiter = RawStream()
waiter.open()
assert runtime().aclrtStreamWaitEvent(waiter.handle, event) == 0
bad.open()"""
    check(
        TWO_STREAMS.replace("\nbad.open()", waits)
        + f"""
assert waiter.synchronize() == {DEVICE_ERROR}
assert runtime().aclrtDestroyStream(waiter.handle) == 0
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
        SOFTNPU_WAIT_LIMIT=None,
    )


def test_without_a_failure_mode_the_next_task_runs_and_one_synchronisation_tells_the_error() -> None:
    """Page aclrtSetStreamFailureMode: the default is to continue. Runtime: Stream::GetError clears the code it returns;
    example/stream/1_stream_with_failure_mode."""
    check(
        f"""
assert acl.rt.set_device(0) == 0
bad, other = RawStream(), RawStream()
bad.fail()
bad.note(1)
event = bad.record()
bad.open(), other.open()
assert runtime().aclrtSynchronizeEvent(event) == 0
other.note(2)
assert other.synchronize() == 0 and other.seen == [2]
assert [bad.synchronize(), bad.synchronize()] == [{DEVICE_ERROR}, 0] and bad.seen == [1]
bad.note(3)
assert bad.synchronize() == 0 and bad.seen == [1, 3]
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
    )


def test_a_stream_that_stops_on_failure_cannot_be_set_to_continue() -> None:
    """Runtime: ApiImpl::StreamSetMode. Page: the default stream has no mode."""
    check(
        f"""
assert acl.rt.set_device(0) == 0
stream = RawStream()
modes = [{CONTINUE_ON_FAILURE}, {STOP_ON_FAILURE}, {STOP_ON_FAILURE}, {CONTINUE_ON_FAILURE}]
assert [stream.set_failure_mode(mode) for mode in modes] == [0, 0, 0, {NOT_SUPPORTED}]
assert runtime().aclrtSetStreamFailureMode(None, c_uint64(1)) == {BAD_ARGUMENT}
"""
    )


TORCH_BESIDE_A_BARE_STREAM = (
    START
    + """
import torch, torch_npu
torch.npu.set_device(0)
stream, kept = torch.npu.Stream(), torch.ones(4, device="npu")
event = torch.npu.Event()
torch.npu.synchronize()

def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise SystemExit("no error")

bare = RawStream()
bare.fail()
bare.open()
"""
)


def test_a_bare_stream_beside_torch_npus_takes_the_process_down() -> None:
    """torch_npu's streams have set the context, so that the failure of any other stream stops them as well."""
    check_python(
        TORCH_BESIDE_A_BARE_STREAM
        + f"""
assert bare.synchronize() == {DEVICE_ERROR}
calls = {{
    "device": torch.npu.synchronize, "stream": stream.synchronize, "query": stream.query,
    "operator": lambda: kept.add_(1), "new tensor": lambda: torch.ones(4, device="npu"), "result": kept.cpu,
    "record": lambda: (event.record(stream), torch.npu.synchronize()),
}}
for name, call in calls.items():
    assert "memset" in error_of(call) or "{DEVICE_ERROR}" in error_of(call), (name, error_of(call))
os._exit(0)
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
    )


def test_restarting_the_device_lets_it_work_again() -> None:
    """torch_npu, Module.cpp: stop_device calls aclrtDeviceTaskAbort, which drops what was submitted (its page) and then
    clears the context's error (runtime: ContextManage::DeviceClean); memory keeps what it held."""
    check_python(
        TORCH_BESIDE_A_BARE_STREAM
        + """
assert bare.synchronize()
assert torch_npu.npu.stop_device(0) == 0
torch_npu.npu.restart_device(0)
assert (kept + 1).tolist() == [2.0] * 4
assert bare.synchronize() == 0
torch.npu.synchronize()
""",
        SOFTNPU_FAULTS=f"{MEMSET_FAILS},nth=1",
    )


def test_aborting_tasks_ends_those_that_wait_and_drops_the_rest() -> None:
    check(
        """
assert acl.rt.set_device(0) == 0
stuck = RawStream()
stuck.note(1)
assert runtime().aclrtDeviceTaskAbort(0, 0) == 0
assert stuck.synchronize() == 0 and stuck.seen == []
stuck.note(2)
assert stuck.synchronize() == 0 and stuck.seen == [2]
"""
    )


def test_relaxed_every_stream_continues() -> None:
    check(
        TWO_STREAMS
        + f"""
other.open()
assert other.synchronize() == 0 and other.seen == [1]
assert bad.synchronize() == {DEVICE_ERROR} and bad.seen == [2]
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
        SOFTNPU_STRICT="-context-stop",
    )


# ---- unlimited-waits
# Page aclrtSetOpWaitTimeout: without a call of it there is no timeout, and it is for aclrtStreamWaitEvent only.

WAITS_FOR_EVER = """
assert acl.rt.set_device(0) == 0
stream, event = RawStream(), c_void_p()
stream.open()
assert runtime().aclrtCreateEventExWithFlag(byref(event), ctypes.c_uint32(0x20)) == 0  # external: not recorded yet
"""


@pytest.mark.parametrize(
    ("setting", "limit_s", "code"),
    [(None, 0, SYNC_TIMEOUT), ("-unlimited-waits", 0, EVENT_TIMEOUT), (None, 1, EVENT_TIMEOUT)],
    ids=["no limit", "relaxed: HCCL's", "aclrtSetOpWaitTimeout"],
)
def test_a_wait_for_an_event_has_the_limit_that_was_set_and_no_other(
    setting: str | None, limit_s: int, code: int
) -> None:
    patience_ms = 1000 if code == SYNC_TIMEOUT else 60_000
    check(
        WAITS_FOR_EVER
        + f"""
assert runtime().aclrtSetOpWaitTimeout(ctypes.c_uint32({limit_s})) == 0
assert runtime().aclrtStreamWaitEvent(stream.handle, event) == 0
assert stream.synchronize({patience_ms}) == {code}
os._exit(0)
""",
        SOFTNPU_WAIT_LIMIT=None,
        SOFTNPU_STRICT=setting,
        HCCL_EXEC_TIMEOUT="0.2",
    )


def test_the_limit_of_a_stream_is_not_that_of_the_host() -> None:
    check(
        WAITS_FOR_EVER
        + """
import threading
stream = RawStream()
assert runtime().aclrtSetOpWaitTimeout(ctypes.c_uint32(1)) == 0
event = stream.record()  # behind a gate
threading.Timer(3, stream.open).start()
assert runtime().aclrtSynchronizeEvent(event) == 0
""",
        SOFTNPU_WAIT_LIMIT=None,
    )


# ---- default-device
# Page aclInit, "default device"; page aclrtGetDevice; runtime: ApiImpl::CurrentContext.
# torch_npu, npu_sys_ctrl.cpp: from CANN 8.3 it passes acl_default.json, {"defaultDevice": {"default_device": "0"}}.


def default_device(tmp_path: Path, value: object) -> str:
    path = tmp_path / "acl.json"
    path.write_text(json.dumps({"dump": {"dump_scene": "lite_exception"}, "defaultDevice": {"default_device": value}}))
    return str(path)


IN_A_THREAD = """
import threading
def allocated(wanted=None):
    def work():
        if wanted is not None:
            assert acl.rt.set_device(wanted) == 0
        seen.append(acl.rt.get_device()[0])
        address = c_void_p()
        seen.append(runtime().aclrtMalloc(byref(address), c_size_t(4096), 0))
        seen.append(acl.rt.get_device()[0])
    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return seen
from softnpu.node_table import read_node_table
opened = lambda: sorted(each.physical for each in read_node_table() if each.pid == os.getpid())
"""


def test_a_thread_without_a_device_uses_the_default_one(tmp_path: Path) -> None:
    path = default_device(tmp_path, "1")
    check(
        IN_A_THREAD
        + f"""
assert acl.rt.get_device()[1] == {NO_CONTEXT} and allocated() == [-1, {NO_CONTEXT}, -1]
assert runtime().aclInit({path!r}.encode()) == 0
assert acl.rt.get_device() == (1, 0) and opened() == []  # named, not opened
assert allocated() == [1, 0, 1] and opened() == [1]
assert allocated(wanted=2) == [2, 0, 2] and opened() == [1, 2]
assert runtime().aclFinalize() == 0 and acl.rt.get_device()[1] == {NO_CONTEXT}
"""
    )


def test_torch_npu_makes_a_forgotten_set_device_use_npu_0() -> None:
    check(
        IN_A_THREAD
        + """
import torch, torch_npu
torch.npu.set_device(3)
assert torch.ones(2, device="npu").device.index == 3 and 0 not in opened()
assert allocated() == [0, 0, 0] and opened() == [0, 3]
"""
    )


@pytest.mark.parametrize(("value", "code"), [("9", 107001), ("x", 100000)])
def test_a_default_device_that_is_none_is_refused(tmp_path: Path, value: str, code: int) -> None:
    check(
        f"""
assert runtime().aclInit({default_device(tmp_path, value)!r}.encode()) == {code}, recent_error()
assert runtime().aclInit(None) == 0  # the failed call has left nothing
assert acl.rt.get_device()[1] == {NO_CONTEXT}
"""
    )


def test_relaxed_there_is_no_default_device(tmp_path: Path) -> None:
    path = default_device(tmp_path, "1")
    code = f"assert runtime().aclInit({path!r}.encode()) == 0 and acl.rt.get_device()[1] == {NO_CONTEXT}"
    check(code, SOFTNPU_STRICT="-default-device")


# ---- capture-pageable, capture-null-stream
# Page aclmdlRICaptureBegin: the mode limits asynchronous copies with host memory that is not locked; page
# aclrtMemcpyAsync: such a copy is synchronous. Runtime: ApiErrorDecorator::MemcpyAsync and ::StreamBeginCapture.

COPY_IN_A_CAPTURE = """
assert acl.rt.set_device(0) == 0
stream, other = RawStream(), RawStream()
stream.open(), other.open()
device, pinned, pageable, graph = c_void_p(), c_void_p(), (ctypes.c_byte * 64)(), c_void_p()
size = c_size_t(64)
assert runtime().aclrtMalloc(byref(device), size, 0) == 0 and runtime().aclrtMallocHost(byref(pinned), size) == 0
def copy(on, host, kind=1):
    to, source = (device, host) if kind == 1 else (host, device)
    return runtime().aclrtMemcpyAsync(to, size, source, size, c_int(kind), on.handle)
assert copy(stream, pageable) == 0 and stream.synchronize() == 0
"""


@pytest.mark.parametrize("kind", [1, 2], ids=["to the device", "from the device"])
def test_pageable_memory_is_not_copied_while_a_graph_is_captured(kind: int) -> None:
    check(
        COPY_IN_A_CAPTURE
        + f"""
for on in (stream, other):
    assert runtime().aclmdlRICaptureBegin(stream.handle, c_int({CAPTURE_GLOBAL})) == 0
    assert copy(on, pageable, {kind}) == {FORBIDDEN_IN_CAPTURE} and "pageable" in recent_error()
    assert runtime().aclmdlRICaptureEnd(stream.handle, byref(graph)) != 0  # invalidated
"""
    )


@pytest.mark.parametrize("host", ["pinned", "registered", "device"])
def test_locked_and_device_memory_is_copied_by_a_graph(host: str) -> None:
    check(
        COPY_IN_A_CAPTURE
        + f"""
registered, second = pageable, c_void_p()
if {host!r} == "registered":
    assert runtime().aclrtHostRegisterV2(registered, c_uint64(64), ctypes.c_uint32(2)) == 0
assert runtime().aclmdlRICaptureBegin(stream.handle, c_int({CAPTURE_GLOBAL})) == 0
assert copy(stream, {host}) == 0, recent_error()
assert runtime().aclmdlRICaptureEnd(stream.handle, byref(graph)) == 0
"""
    )


def test_a_relaxed_capture_forbids_it_on_its_own_streams_only() -> None:
    check(
        COPY_IN_A_CAPTURE
        + f"""
assert runtime().aclmdlRICaptureBegin(stream.handle, c_int({CAPTURE_RELAXED})) == 0
assert copy(other, pageable) == 0 and copy(stream, pageable) == {STREAM_CAPTURED}
"""
    )


def test_the_null_stream_cannot_be_captured() -> None:
    code = f"""
assert acl.rt.set_device(0) == 0
assert runtime().aclmdlRICaptureBegin(None, c_int({CAPTURE_GLOBAL})) == %d
"""
    check(code % BAD_ARGUMENT)
    check(code % OK, SOFTNPU_STRICT="-capture-null-stream")


def test_a_capture_has_one_of_three_modes() -> None:
    """Runtime: ApiErrorDecorator::StreamBeginCapture."""
    check(COPY_IN_A_CAPTURE + f"assert runtime().aclmdlRICaptureBegin(stream.handle, c_int(9)) == {BAD_ARGUMENT}")


def test_the_null_stream_does_not_join_a_capture() -> None:
    """Runtime: ApiImpl::StreamWaitEvent refuses a dependency of the default stream on a capture."""
    code = f"""
assert acl.rt.set_device(0) == 0
stream = RawStream()
stream.open()
assert runtime().aclmdlRICaptureBegin(stream.handle, c_int({CAPTURE_RELAXED})) == 0
assert runtime().aclrtStreamWaitEvent(None, stream.record()) == %d
"""
    check(code % NULL_STREAM_IN_CAPTURE)
    check(code % OK, SOFTNPU_STRICT="-capture-null-stream")


CONVERTED = """
import torch, torch_npu
source, target = torch.zeros(4, dtype=torch.float64), torch.ones(4, device="npu")
if PINNED:
    source = source.pin_memory()
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    target.copy_(source, non_blocking=True)
source += 5
graph.replay()
torch.npu.synchronize()
assert target.tolist() == [5.0] * 4, target
"""


def test_a_copy_that_converts_is_no_way_around_it() -> None:
    """torch_npu, CopyKernelOpApi.cpp: the source is copied as it is, and converted on the device."""
    done = run_python("PINNED = False\n" + CONVERTED)
    assert done.returncode and "pageable host memory" in done.stderr, done.stderr
    check_python("PINNED = True\n" + CONVERTED)


def test_relaxed_pageable_memory_is_captured() -> None:
    code = f"""
assert runtime().aclmdlRICaptureBegin(stream.handle, c_int({CAPTURE_GLOBAL})) == 0
assert copy(stream, pageable) == 0 and runtime().aclmdlRICaptureEnd(stream.handle, byref(graph)) == 0
"""
    check(COPY_IN_A_CAPTURE + code, SOFTNPU_STRICT="-capture-pageable")


# ---- stream-context: runtime, "stream is not in current ctx" of ApiImpl's functions; a synchronisation switches


def test_a_stream_is_used_by_threads_of_its_device_alone() -> None:
    code = f"""
assert acl.rt.set_device(1) == 0
stream = RawStream()
stream.open()
event = stream.record()
assert acl.rt.set_device(0) == 0
buffer, size, mode = (ctypes.c_byte * 8)(), c_size_t(8), c_int({CAPTURE_RELAXED})
codes = [
    runtime().aclrtRecordEvent(event, stream.handle),
    runtime().aclrtStreamWaitEvent(stream.handle, event),
    runtime().aclrtMemcpyAsync(buffer, size, buffer, size, c_int(3), stream.handle),
    runtime().aclrtMemsetAsync(buffer, size, c_int(0), size, stream.handle),
    runtime().aclmdlRICaptureBegin(stream.handle, mode),
]
assert codes == [%d] * 5, codes
"""
    check(code % OTHER_CONTEXT + "assert stream.synchronize() == 0")
    check(code % OK, SOFTNPU_STRICT="-stream-context")


# ---- zero-bytes: runtime, ApiErrorDecorator::MemcpyAsync and ::MemsetAsync


def test_no_bytes_are_neither_copied_nor_set() -> None:
    code = """
assert acl.rt.set_device(0) == 0
buffer, none = (ctypes.c_byte * 8)(), c_size_t(0)
assert runtime().aclrtMemcpyAsync(buffer, c_size_t(8), buffer, none, c_int(3), None) == %d
assert runtime().aclrtMemsetAsync(buffer, c_size_t(8), c_int(0), none, None) == %d
"""
    check(code % (BAD_ARGUMENT, BAD_ARGUMENT))
    check(code % (OK, OK), SOFTNPU_STRICT="-zero-bytes")


# ---- host-register-zero: runtime, ApiErrorDecorator::HostRegisterV2


def test_no_bytes_and_no_address_cannot_be_registered() -> None:
    code = """
assert acl.rt.set_device(0) == 0
memory = (ctypes.c_byte * 64)()
wrong = (memory, c_uint64(0)), (None, c_uint64(8))
codes = [runtime().aclrtHostRegisterV2(*each, ctypes.c_uint32(2)) for each in wrong]
assert codes == [%d] * 2, codes
"""
    check(code % BAD_ARGUMENT)
    check(code % OK, SOFTNPU_STRICT="-host-register-zero")


# ---- reset-device
# Pages aclrtSetDevice, aclrtResetDevice and aclrtResetDeviceForce: a set counts one up, a reset one down, and at 0 the
# device's resources are freed; one reset more is an error (runtime: PrimaryContextRelease).

HELD = (
    IN_A_THREAD
    + """
assert [acl.rt.set_device(0) for _ in range(3)] == [0] * 3
stream, address, handle = RawStream(), c_void_p(), c_void_p()
stream.open()
event = stream.record()
assert runtime().aclrtMalloc(byref(address), c_size_t(1 << 20), 0) == 0
held = lambda: [(each.physical, each.memory, each.streams) for each in read_node_table() if each.pid == os.getpid()]
kept = [(0, 1 << 20, 1)]
assert held() == kept
"""
)
FREED = f"""
assert opened() == [] and acl.rt.get_device()[1] == {NO_CONTEXT}
assert acl.rt.set_device(0) == 0 and held() == [(0, 0, 0)]
assert runtime().aclrtSynchronizeStream(stream.handle) != 0 and "unknown stream" in recent_error()
assert runtime().aclrtSynchronizeEvent(event) != 0 and runtime().aclrtFree(address) != 0
"""


def test_the_last_reset_of_a_device_frees_what_the_process_has_of_it() -> None:
    check(
        HELD
        + """
for _ in range(2):
    assert acl.rt.reset_device(0) == 0 and held() == kept and stream.synchronize() == 0
assert acl.rt.reset_device(0) == 0
"""
        + FREED
    )


def test_a_forced_reset_does_not_count() -> None:
    check(HELD + "assert runtime().aclrtResetDeviceForce(0) == 0" + FREED)


def test_a_device_cannot_be_reset_more_often_than_it_was_set() -> None:
    code = "assert [acl.rt.set_device(0), acl.rt.reset_device(0), acl.rt.reset_device(0)] == [0, 0, %d]"
    check(code % RESET_TOO_OFTEN)
    check(code % OK, SOFTNPU_STRICT="-reset-device")


def test_a_reset_waits_for_the_tasks() -> None:
    check(
        """
import threading
assert acl.rt.set_device(0) == 0
stream = RawStream()
stream.note(1)
threading.Timer(0.2, stream.open).start()
assert acl.rt.reset_device(0) == 0 and stream.seen == [1]
"""
    )


def test_a_reset_clears_the_error_of_a_context() -> None:
    check(
        TWO_STREAMS
        + f"""
assert bad.synchronize() == {DEVICE_ERROR}
other.open()
assert acl.rt.reset_device(0) == 0 and acl.rt.set_device(0) == 0
fresh = RawStream()
fresh.note(1)
fresh.open()
assert fresh.synchronize() == 0 and fresh.seen == [1]
""",
        SOFTNPU_FAULTS=MEMSET_FAILS,
    )
