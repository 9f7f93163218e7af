"""A start divided into phases, at the same points for every executor. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PHASES = ("driver", "launch", "import", "device", "load", "connect", "kv cache", "warm-up", "rest")
"""What lies between the points of a start, in order.

driver: the engine's process begins, until it makes its executor; launch: until the last worker process exists (over
Ray: joins the cluster, reserves NPUs); import: until that has vLLM, torch_npu and its class; device: until the NPU is
open and the groups are made; load: the weights; connect: message queues, and the executor is made; kv cache: until its
memory is there; warm-up: the first pass and graphs; rest: scheduler and the like.
"""


def phases(driver: Mapping[str, float], workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return seconds of each phase, from points in time: the slowest worker's where workers have them.

    A worker process may be older than the executor (Ray keeps spare ones): then launch is 0. Phases add up to the
    whole start as far as the driver's points go.
    """
    points = {name: max(worker[name] for worker in workers) for name in ("process", "import", "device", "load")}
    ends = {
        "driver": driver["executor begins"],
        "launch": points["process"],
        "import": points["import"],
        "device": points["device"],
        "load": points["load"],
        "connect": driver["executor ends"],
        "kv cache": driver.get("kv cache"),
        "warm-up": driver.get("warm-up"),
        "rest": driver.get("engine"),
    }
    result, before = {}, driver["begin"]
    for name in PHASES:
        end = ends[name]
        if end is not None:
            result[name] = max(0.0, end - before)
            before = max(before, end)
    return result
