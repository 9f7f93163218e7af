"""What follows a failure: every wait is cancelled, vLLM is notified, and no file of a user's is removed."""

from __future__ import annotations

import re
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from vllm_ray_ascend.errors import WorkerDiedError
from vllm_ray_ascend.executor.executor import RayAscendExecutor

SHM = Path("/dev/shm")
WORKER = """
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
resource_tracker.register = lambda *_: None  # it would remove all that this process has opened
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
from vllm_ray_ascend.ipc.message_queue import record_segments
record_segments()
users = SharedMemory(name=sys.argv[1])
ring = ShmRingBuffer(1, 64, 2)
opened = ShmRingBuffer(*ring.handle())
print("segment of the queue:", ring.shared_memory.name, flush=True)
RayAscendWorkerProc.__new__(RayAscendWorkerProc)._terminate(lost=False)
"""


class Queue:
    """A message queue whose `cancel` may raise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.cause: BaseException | None = None

    def cancel(self, cause: BaseException) -> None:
        self.cause = cause
        if self.error is not None:
            raise self.error


def test_vllm_is_notified_though_a_wait_cannot_be_cancelled() -> None:
    called: list[str] = []
    executor = RayAscendExecutor.__new__(RayAscendExecutor)
    queues = [Queue(OSError("no memory")), Queue()]
    executor.rpc_broadcast_mq, executor.response_mqs = queues[0], queues[1:]
    executor.failure_callback = lambda: called.append("callback")  # type: ignore[assignment]
    cause = WorkerDiedError("VRA-1", "died")
    executor._handle_failure(cause)
    assert called == ["callback"]
    assert [queue.cause for queue in queues] == [cause, cause]


def test_a_worker_that_ends_at_once_removes_the_segments_of_its_queues_only() -> None:
    users = SharedMemory(create=True, size=64)
    try:
        command = [sys.executable, "-c", WORKER, users.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 1, done.stderr
        found = re.search(r"segment of the queue: (psm_\w+)", done.stdout)
        assert found is not None, done.stdout + done.stderr
        assert not (SHM / found[1]).exists()
        assert (SHM / users.name).exists()
    finally:
        users.close()
        (SHM / users.name).unlink(missing_ok=True)
