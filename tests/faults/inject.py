"""Fault injection into a running engine, from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from tests.faults.plan import Case, Fault

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
    """Fault injection into one cluster, whose node i reads faults of its NPUs from ``folder``/i."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder

    def clear_faults(self) -> None:
        """Remove all faults of NPUs."""
        for node in self._cluster.nodes:
            (self._folder / str(node.index)).write_text("")

    def inject(self, case: Case) -> None:
        """Inject the fault of ``case`` now. Rank r is on node r + 1."""
        node = case.rank + 1
        if case.fault in _SIGNALS:
            self._send_signal(node, _SIGNALS[case.fault], _WORKER)
        elif case.fault is Fault.DRIVER:
            self._send_signal(1, "KILL", _ENGINE_CORE)
        elif case.fault is Fault.SERVER:
            self._send_signal(1, "KILL", _SERVER)
        elif case.fault is Fault.RAYLET:
            self._send_signal(node, "KILL", "/raylet/raylet ")
        elif case.fault is Fault.LINK:
            link = self._cluster.nodes[node - 1].link
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
        else:
            # In place: the NPUs read the file at any moment, and must never see half a text.
            (self._folder / str(node)).write_text(_DEVICE_FAULTS[case.fault].format(rank=case.rank))

    def restore_link(self, case: Case) -> None:
        """Undo a cut link, so that the node can be cleaned."""
        link = self._cluster.nodes[case.rank].link
        subprocess.run(["ip", "link", "set", link, "up"], check=True)

    def list_processes(self) -> list[str]:
        """Return the processes of any engine, on all nodes."""
        found = []
        for node in self._cluster.nodes:
            for pattern in (_WORKER, _ENGINE_CORE, _SERVER):
                command = manager.node_command(self._cluster, node.index, ["pgrep", "-fa", pattern])
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
                assert done.returncode in (0, _NONE_FOUND), done.stderr
                found += done.stdout.splitlines()
        return found

    def _send_signal(self, node: int, signal: str, pattern: str) -> None:
        command = manager.node_command(self._cluster, node, ["pkill", f"-{signal}", "-f", pattern])
        subprocess.run(command, check=True, timeout=60)
