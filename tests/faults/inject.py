"""Puts a fault into a running engine, from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.faults.plan import Case, Fault
from vllm_ray_ascend.softnpu.cluster import manager
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

_SIGNALS = {Fault.KILL: "KILL", Fault.ABORT: "ABRT", Fault.STOP: "STOP"}
_DEVICE_FAULTS = {
    Fault.SILENT: "hccl_silent:rank={rank}",
    Fault.NO_MEMORY: "no_memory",
    Fault.NO_DEVICE: "open_device",
    Fault.NO_CAPTURE: "capture:nth=1",
}
_WORKER = "RayAscendWorkerProc"
_ENGINE_CORE = "VLLM::EngineCore"
_SERVER = "vllm serve "
_NONE_FOUND = 1  # pgrep's exit status


class Injector:
    """Of one cluster, whose node i reads faults of its NPUs from ``folder``/i."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder

    def calm(self) -> None:
        """No fault of any NPU from now on."""
        for node in self._cluster.nodes:
            (self._folder / str(node.index)).write_text("")

    def inject(self, case: Case) -> None:
        """Do what ``case`` says, now. Rank r is on node r + 1."""
        node = case.rank + 1
        if case.fault in _SIGNALS:
            self._kill(node, _SIGNALS[case.fault], _WORKER)
        elif case.fault is Fault.DRIVER:
            self._kill(1, "KILL", _ENGINE_CORE)
        elif case.fault is Fault.SERVER:
            self._kill(1, "KILL", _SERVER)
        elif case.fault is Fault.RAYLET:
            self._kill(node, "KILL", "/raylet/raylet ")
        elif case.fault is Fault.LINK:
            link = self._cluster.nodes[node - 1].link
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
        else:
            # In place: the NPUs read the file at any moment, and half a text must not be there.
            (self._folder / str(node)).write_text(_DEVICE_FAULTS[case.fault].format(rank=case.rank))

    def join_link(self, case: Case) -> None:
        """Undo a cut, so that the node can be cleaned."""
        link = self._cluster.nodes[case.rank].link
        subprocess.run(["ip", "link", "set", link, "up"], check=True)

    def processes(self) -> list[str]:
        """What runs of any engine, on all nodes."""
        found = []
        for node in self._cluster.nodes:
            for pattern in (_WORKER, _ENGINE_CORE, _SERVER):
                command = manager.node_command(self._cluster, node.index, ["pgrep", "-fa", pattern])
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
                assert done.returncode in (0, _NONE_FOUND), done.stderr
                found += done.stdout.splitlines()
        return found

    def _kill(self, node: int, signal: str, pattern: str) -> None:
        command = manager.node_command(self._cluster, node, ["pkill", f"-{signal}", "-f", pattern])
        subprocess.run(command, check=True, timeout=60)
