"""The NPU accelerator class and HCCL on NPUs: an acceptance of one node. Written on software NPUs.

python -m pytest tests/hardware -m npu                                   # on an Atlas server
.venv/bin/softnpu exec -- .venv/bin/python -m pytest tests/hardware -m npu   # anywhere
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.cluster.node_facts import collect_node_facts
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES
from vllm_ray_ascend.doctor.collect import collect_record
from vllm_ray_ascend.doctor.queries import LIST, QUERIES
from vllm_ray_ascend.errors import CaptureError


def _available() -> bool:
    """Return whether torch_npu finds an NPU. Its import fails where there is no CANN."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError):
        return False
    return bool(torch.npu.is_available())


pytestmark = [pytest.mark.npu, pytest.mark.skipif(not _available(), reason="needs an Ascend NPU and CANN")]

LIMIT_S = 300
SUM = """
import os, sys, torch, torch_npu, torch.distributed as dist
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.npu.set_device(rank)
dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=size)
summed = torch.full((1 << 20,), float(rank + 1), device=f"npu:{rank}")
dist.all_reduce(summed)
assert summed.unique().tolist() == [size * (size + 1) / 2], summed
got = torch.zeros(8, device=f"npu:{rank}")
def send():
    dist.send(torch.full((8,), float(rank), device=f"npu:{rank}"), (rank + 1) % size)
def receive():
    dist.recv(got, (rank - 1) % size)
# The first one of each pair waits on the host for its peer: if all sent first, nobody would receive.
for act in (send, receive) if rank % 2 == 0 else (receive, send):
    act()
assert got.tolist() == [float((rank - 1) % size)] * 8, got
dist.destroy_process_group()
"""


@pytest.fixture
def npu() -> Accelerator:
    found = get_accelerator("npu")
    found.bind_thread(0)
    return found


def test_cann_torch_and_the_visible_list_agree(npu: Accelerator) -> None:
    facts = collect_node_facts()
    assert facts.cann_devices is not None, facts.cann_error
    visible = os.environ.get(VISIBLE_DEVICES)
    assert npu.device_count() == (len(visible.split(",")) if visible else facts.cann_devices)
    assert facts.npu_smi in (None, facts.cann_devices)


def test_doctor_understands_what_the_tools_print() -> None:
    """A failure has an output that tests/doctor/machines/ lacks: please report it."""
    record = collect_record("", list(QUERIES), limit_s=LIMIT_S)
    if not record.facts.dies:
        pytest.skip(f"npu-smi lists no NPU: {record.outputs[LIST].text}")
    lines = {query.line(die): query for query in QUERIES.values() for die in record.facts.dies}
    answered = {line: output.text for line, output in record.outputs.items() if line in lines and output.code == 0}
    assert answered and {line: text for line, text in answered.items() if lines[line].parse(text) is None} == {}


def test_every_npu_computes(npu: Accelerator) -> None:
    expected = torch.arange(64.0).reshape(8, 8) @ torch.arange(64.0).reshape(8, 8).T
    wrong: list[str] = []

    def body(index: int) -> None:
        npu.bind_thread(index)
        x = torch.arange(64.0, device=npu.torch_device(index)).reshape(8, 8)
        if not torch.equal((x @ x.T).cpu(), expected):
            wrong.append(f"NPU {index}")

    threads = [threading.Thread(target=body, args=(index,)) for index in range(npu.device_count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_events_order_streams(npu: Accelerator) -> None:
    producer, consumer, event = npu.create_stream(), npu.create_stream(), npu.create_event()
    x, seen = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    large = torch.ones(512, 512, device="npu")
    npu.synchronize()
    with npu.stream_context(producer):
        for _ in range(50):
            large = (large @ large).clamp(max=1.0)
        x.copy_(large[0, :4] + 2)
        event.record()
    with npu.stream_context(consumer):
        event.wait()
        seen.copy_(x)
    npu.synchronize()
    assert seen.tolist() == [3.0] * 4


def test_a_graph_is_replayed_and_device_work_is_refused_during_its_capture(npu: Accelerator) -> None:
    npu.watch_captures()
    x = torch.ones(4, device="npu")
    errors: list[Any] = []

    def other_thread() -> None:
        npu.bind_thread(0)
        try:
            with npu.exclude_captures("a receive"):
                errors.append("not refused")
        except CaptureError as error:
            errors.append(str(error))

    npu.synchronize()
    graph = npu.graph_class()
    with torch.npu.graph(graph):
        x.add_(1)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    for _ in range(2):
        graph.replay()
    npu.synchronize()
    assert x.tolist() == [3.0] * 4
    assert "a receive would touch the device" in errors[0]


def test_out_of_memory_is_explained(npu: Accelerator) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 45, dtype=torch.uint8, device="npu")
    assert "out of memory" in str(npu.explain_error(raised.value))


def test_hccl_between_the_npus_of_this_node(npu: Accelerator, tmp_path: Path) -> None:
    size = npu.device_count()
    if size < 2:
        pytest.skip("one NPU has no peer")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SUM, str(rank), str(size), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)[-5000:]
