"""What tests.softnpu.test_graph_hooks runs in a fresh process, with our hooks or without: JSON after a marker.

python -m tests.softnpu.graphs_script hooked
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch
import torch_npu  # noqa: F401

from vllm_ray_ascend.accelerators.choose import get_accelerator

MARKER = "RESULT "
MIB = 1 << 20
NPU = get_accelerator("npu")


def held() -> dict[str, int]:
    """Return MiB and streams of this process, as the software NPU counts them."""
    from softnpu.node_table import read_node_table

    gc.collect()
    torch.npu.empty_cache()
    mine = [each for each in read_node_table() if each.pid == os.getpid()]
    return {"mib": sum(each.memory for each in mine) // MIB, "streams": sum(each.streams for each in mine)}


def error_of(function: Any) -> str:
    """Return what ``function`` raised, or ""."""
    try:
        function()
    except Exception as error:  # noqa: BLE001  the text is the result
        return " ".join(str(error).split())
    return ""


class Captures:
    """Captures into one pool, as vllm-ascend's do."""

    def __init__(self) -> None:
        from vllm_ascend.compilation.updatable_graph import UpdatableGraph

        self._kind = UpdatableGraph
        self._pool = torch.npu.graph_pool_handle()
        self._stream = torch.npu.Stream()
        self.graphs: list[Any] = []

    def capture_one(self, mib: int = 1) -> None:
        """Capture a graph that works on so much memory."""
        with torch.npu.stream(self._stream):
            stream = NPU.current_stream()
            graph = self._kind()
            try:
                with torch.npu.graph(graph, pool=self._pool):
                    torch.ones(mib * MIB // 4, device="npu").mul_(2)
            finally:
                NPU.set_stream(stream)
            self.graphs.append(graph)

    def capture_until_failure(self) -> str:
        """Capture until the NPU has no stream left; return the error."""
        while True:
            text = error_of(self.capture_one)
            if text:
                return text

    def reset(self) -> None:
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()


def no_streams() -> dict[str, Any]:
    """A capture that cannot begin, then again with fewer graphs."""
    captures = Captures()
    before = held()
    failure = captures.capture_until_failure()
    full, free = held(), NPU.count_free_streams()
    captures.reset()
    return {
        "free": [free, NPU.count_free_streams()],
        "failure": failure,
        "graphs": full["streams"] - before["streams"],
        "left": {name: held()[name] - before[name] for name in before},
        "same_pool": error_of(captures.capture_one),
        "again": error_of(Captures().capture_one),
        "random": error_of(lambda: torch.rand(2, device="npu").tolist()),
    }


def broken() -> dict[str, Any]:
    """A capture that fails at its end, and one that finds no memory."""
    captures = Captures()
    before = held()
    with open(os.environ["SOFTNPU_FAULTS"][1:], "w") as faults:
        faults.write("capture:after=0")
    failure = error_of(lambda: captures.capture_one(mib=64))
    with open(os.environ["SOFTNPU_FAULTS"][1:], "w"):
        pass
    left = held()
    memory = error_of(lambda: captures.capture_one(mib=4096))
    return {
        "failure": failure,
        "memory": memory,
        "left": {name: left[name] - before[name] for name in before},
        "again": error_of(captures.capture_one),
    }


class _Provider:
    def resolve(self, context: Any) -> dict[str, Any]:
        return {"factor": context}


def update() -> dict[str, Any]:
    """A graph that waits for its update, which fails between two tasks."""
    from vllm_ascend.compilation.updatable_graph import ContextSource, UpdatableGraph, register_task

    out = torch.zeros(4, device="npu")

    def operation(out: torch.Tensor, factor: float) -> None:
        if factor < 0:
            raise ValueError("no such factor")
        out.add_(factor)

    graph, provider = UpdatableGraph(), _Provider()
    with torch.npu.graph(graph):
        register_task(operation, {"out": out, "factor": 1.0}, provider)
        register_task(operation, {"out": out, "factor": 1.0}, provider)
    side = torch.npu.Stream()

    def step(*factors: float) -> None:
        tasks = [task.bind({"factor": factor}) for task, factor in zip(graph.tasks, factors, strict=True)]
        torch.npu.current_stream().synchronize()
        graph.replay()
        graph.update(side, tuple(tasks))

    assert ContextSource(2.0).get(provider)[0] == {"factor": 2.0}
    step(2.0, 3.0)
    torch.npu.synchronize()
    good = out.tolist()
    return {"good": good, "failure": error_of(lambda: step(2.0, -1.0)), "synchronize": error_of(torch.npu.synchronize)}


def unusable() -> dict[str, Any]:
    """A stream that joins a capture and is not available: torch_npu allocates it in its task queue, which ends then."""
    side, event = torch.npu.Stream(), torch.npu.Event()
    x, stream, graphs = torch.ones(4, device="npu"), NPU.current_stream(), []

    def capture() -> None:
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            event.record()
            event.wait(side)
            with torch.npu.stream(side):
                x.add_(1)
            event.record(side)
            event.wait()
        graphs.append(graph)

    usable_before = NPU.is_device_usable()
    while not (failure := error_of(capture)):
        pass
    NPU.set_stream(stream)
    return {
        "usable_before": usable_before,
        "graphs": len(graphs),
        "failure": failure,
        "usable_after": NPU.is_device_usable(),
    }


def main(how: str) -> dict[str, Any]:
    """Run all ``hooked`` or ``bare``, or the ``update`` alone, bare: it needs no broken capture before."""
    import vllm_ascend.worker.worker  # noqa: F401

    if how == "hooked":
        from vllm_ray_ascend.acl_graphs import hooks

        NPU.watch_captures()
        NPU.watch_captures()
        hooks.install()
        hooks.install()
    torch.npu.Stream()  # torch_npu creates its streams all at once
    if how == "update":
        return update()
    results = {"no_streams": no_streams(), "broken": broken(), "update": update()}
    # Without the hooks the failed update has stopped the device.
    return {**results, "unusable": unusable()} if how == "hooked" else results


if __name__ == "__main__":
    print(MARKER + json.dumps(main(sys.argv[1])), flush=True)
