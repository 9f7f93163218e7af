"""What CANN's documents leave open, measured: `python -m tests.hardware.questions abort|destroy|stop`.

``abort`` and ``destroy`` need two NPUs of this node, ``stop`` one. What is measured is reported, and nothing of it is a
failure, but that an NPU does not compute in a new process afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from tests.hardware.engine import MARKER

LIMIT_S = 180.0
_TOOLS = """
import json, sys, threading, time, torch, torch_npu
def said(call):
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\\n")[0][:200]
def result(**figures):
    print("RESULT" + json.dumps(figures), flush=True)
"""
_RANKS = """
from vllm_ray_ascend.hccl.communicator import Group, create_root_info
rank = int(sys.argv[1])
torch.npu.set_device(rank)
if rank == 0:
    root_info = create_root_info(0)
    print("ROOT" + root_info.hex(), flush=True)
else:
    root_info = bytes.fromhex(sys.stdin.readline().strip())
tensor = torch.ones(1 << 20, device=f"npu:{rank}")
torch.npu.synchronize()
"""
ABORT = """
group = Group(rank, rank, 2, root_info).connect()
group.all_reduce(tensor, tensor).wait()
assert tensor[0].item() == 2.0, tensor[0].item()
print("connected", flush=True)
if rank == 1:
    time.sleep(600)  # never takes part in the second one
transfer = group.all_reduce(tensor, tensor)
time.sleep(1)
began = time.monotonic()
group.abort("the acceptance ends it")
aborted = time.monotonic() - began
operation = said(lambda: transfer.wait(60))
group.destroy()
result(abort_s=aborted, destroyed_s=time.monotonic() - began, operation=operation)
"""
"""Our way to end a communicator while an operation waits for a peer that never comes."""
DESTROY = """
from vllm_ray_ascend.hccl.library import Buffer, load_library
from vllm_ray_ascend.hccl.stream import AclStream
hccl, stream = load_library(), AclStream()
comm = hccl.init_communicator(2, root_info, rank)
buffer = Buffer(tensor.data_ptr(), tensor.numel(), 4)
hccl.all_reduce(buffer, buffer, 0, comm, stream.handle)
assert stream.synchronize(60)
print("connected", flush=True)
if rank == 1:
    time.sleep(600)  # never takes part in the second one
hccl.all_reduce(buffer, buffer, 0, comm, stream.handle)
event = stream.record_event()
time.sleep(1)
before = said(event.is_complete)
answers, began, done = [], time.monotonic(), threading.Event()
def destroy():
    torch.npu.set_device(0)
    while len(answers) < 20:
        answers.append(said(lambda: hccl.destroy_communicator(comm)))
        if answers[-1] == "None":
            break
        time.sleep(0.5)
    done.set()
threading.Thread(target=destroy, daemon=True).start()
returned = done.wait(60)
seconds = time.monotonic() - began
time.sleep(1)
result(
    returned=returned, destroy_s=seconds, answers=answers[:3], event_before=before, event_after=said(event.is_complete),
    stream_after=said(lambda: stream.synchronize(10)), stream_status=said(lambda: stream.synchronize(1)),
    other_stream_after=said(lambda: (torch.ones(8, device="npu:0") + 1).sum().item()),
)
"""
"""HCCL's own: what HcclCommDestroy answers under load, and how event and stream stand afterwards."""
STOP = """
from vllm_ray_ascend.hccl.stream import AclStream, acl_handle
torch.npu.set_device(0)
kept, large = torch.ones(8, device="npu:0"), torch.ones(512, 512, device="npu:0")
def work(times):
    global large
    for _ in range(times):
        large = (large @ large).clamp(max=1.0)
work(2)
torch.npu.synchronize()
began = time.monotonic()
work(10)
torch.npu.synchronize()
work(min(20000, int(20 / (time.monotonic() - began)) + 1))  # 2 s
event = torch.npu.Event()
event.record()
began = time.monotonic()
stopped = said(lambda: torch_npu.npu.stop_device(0))
seconds = time.monotonic() - began
after = dict(event_after=said(event.query), stream_after=said(torch.npu.synchronize))
restarted = said(lambda: torch_npu.npu.restart_device(0))
result(
    stop=stopped, stop_s=seconds, **after, restart=restarted, event_restarted=said(event.query),
    computes_restarted=said(lambda: (kept + 1).sum().item()),
)
"""
"""torch_npu's stop_device while operators are queued: the state of an event behind them, and after restart_device."""
_COMPUTES = f"""
import faulthandler
faulthandler.dump_traceback_later({LIMIT_S - 10})
import torch, torch_npu
x = torch.ones(8, device="npu:0")
assert (x + x).sum().item() == 16
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _read(process: subprocess.Popen[str], prefix: str) -> str:
    """Return what follows the prefix in the first line that begins with it. Raises RuntimeError where none comes."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
    raise RuntimeError(f"a process ended with exit code {process.wait()} and without {prefix!r}")


def _between_two(code: str) -> dict[str, Any]:
    """Return the result of rank 0 of two, of which the other one takes part in nothing after it has connected."""
    ranks = [_start(_TOOLS + _RANKS + code, str(rank)) for rank in range(2)]
    try:
        root_info = _read(ranks[0], "ROOT")
        assert ranks[1].stdin is not None
        ranks[1].stdin.write(root_info + "\n")
        ranks[1].stdin.flush()
        for rank in ranks:
            _read(rank, "connected")
        found: dict[str, Any] = json.loads(_read(ranks[0], "RESULT"))
        return found
    finally:
        for process in ranks:
            process.kill()


def _alone(code: str) -> dict[str, Any]:
    process = _start(_TOOLS + code)
    try:
        found: dict[str, Any] = json.loads(_read(process, "RESULT"))
        return found
    finally:
        process.kill()


def ask(question: str) -> dict[str, Any]:
    """Return what was measured."""
    return _alone(STOP) if question == "stop" else _between_two({"abort": ABORT, "destroy": DESTROY}[question])


def compute_afterwards(limit_s: float = LIMIT_S, code: str = _COMPUTES) -> dict[str, Any]:
    """Return whether an NPU computes in a new process, and after how many seconds that was known."""
    began = time.monotonic()
    try:
        ended = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        ended = None
    return {"computes_afterwards": ended == 0, "new_process_s": time.monotonic() - began}


def main(question: str) -> int:
    """Print what was measured, at once and again with what came of an NPU; 1 where it does not compute."""
    found = ask(question)
    print(MARKER + json.dumps(found), flush=True)
    found |= compute_afterwards()
    print(MARKER + json.dumps(found), flush=True)
    return 0 if found["computes_afterwards"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
