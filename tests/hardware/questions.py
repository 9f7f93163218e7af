"""What CANN's documents leave open, measured on two NPUs of this node: `python -m tests.hardware.transport`.

How long it takes to end a communicator while an operation waits for a peer that never comes, how the operation then
ends, and whether the NPU computes in a new process afterwards.
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
_RANK = """
import json, sys, time, torch, torch_npu
from vllm_ray_ascend.hccl.communicator import Group, create_root_info
rank = int(sys.argv[1])
torch.npu.set_device(rank)
if rank == 0:
    root_info = create_root_info(0)
    print("ROOT" + root_info.hex(), flush=True)
else:
    root_info = bytes.fromhex(sys.stdin.readline().strip())
group = Group(rank, rank, 2, root_info).connect()
tensor = torch.ones(1 << 20, device=f"npu:{rank}")
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
try:
    transfer.wait(60)
    ended = "as if it had succeeded"
except Exception as error:
    ended = f"{type(error).__name__}: {error}"
group.destroy()
destroyed = time.monotonic() - began
print("RESULT" + json.dumps({"abort_s": aborted, "destroyed_s": destroyed, "operation": ended}), flush=True)
"""
_COMPUTES = "import torch, torch_npu; x = torch.ones(8, device='npu:0'); assert (x + x).sum().item() == 16"


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
    raise RuntimeError(f"a rank ended with exit code {process.wait()} and without {prefix!r}")


def main() -> dict[str, Any]:
    """Return seconds and the end of the operation, and whether an NPU computes after it."""
    ranks = [_start(_RANK, str(rank)) for rank in range(2)]
    try:
        root_info = _read(ranks[0], "ROOT")
        assert ranks[1].stdin is not None
        ranks[1].stdin.write(root_info + "\n")
        ranks[1].stdin.flush()
        for rank in ranks:
            _read(rank, "connected")
        result: dict[str, Any] = json.loads(_read(ranks[0], "RESULT"))
    finally:
        for process in ranks:
            process.kill()
    began = time.monotonic()
    after = subprocess.run([sys.executable, "-c", _COMPUTES], env=os.environ, timeout=LIMIT_S, check=False)
    return {**result, "computes_afterwards": after.returncode == 0, "new_process_s": time.monotonic() - began}


if __name__ == "__main__":
    print(MARKER + json.dumps(main()), flush=True)
