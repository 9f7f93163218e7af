"""vllm-ascend's worker with a clock. Imported in worker processes, the same under every executor."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm_ascend.worker.worker import NPUWorker

_IMPORTED = time.monotonic()


def process_start() -> float:
    """Return when this process started, on the clock of time.monotonic(), to 10 ms."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


class TimedWorker(NPUWorker):
    """Notes when each step of its start was done; all processes of a machine share the clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.bench_marks = {"process": process_start(), "import": _IMPORTED}
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Open the NPU and make the groups."""
        super().init_device()
        self.bench_marks["device"] = time.monotonic()

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the weights."""
        self.bench_marks["before load"] = time.monotonic()
        result = super().load_model(*args, **kwargs)
        self.bench_marks["load"] = time.monotonic()
        return result

    def bench_started(self) -> tuple[int, dict[str, float]]:
        """Return this worker's process number and marks."""
        return os.getpid(), self.bench_marks

    def bench_nothing(self) -> None:
        """Do nothing: the target of an empty call."""
