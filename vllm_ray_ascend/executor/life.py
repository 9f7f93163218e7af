"""The life of an engine's workers as the executor sees it: watched, ended in order, or stopped at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.errors import WorkerDiedError
from vllm_ray_ascend.executor.lifeline import DIE, STOP, Hub
from vllm_ray_ascend.executor.shared_memory import remove
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

if TYPE_CHECKING:
    from vllm_ray_ascend.executor.executor import RayAscendExecutor

logger = get_logger(__name__)

_RAY_POLL_S = 1.0
_DIE_LIMIT_S = 2.0


class Life:
    """Whether the workers of one executor live, and how they end."""

    def __init__(self, executor: RayAscendExecutor) -> None:
        self._executor = executor
        self._hub: Hub | None = None
        self._lock = threading.Lock()
        self._ending = False
        self.first_death = ""
        """Which worker died first, and where: the cause, whatever its siblings say afterwards."""

    def hub_text(self) -> str:
        """Where workers find this executor. Ray must be joined."""
        import ray

        if self._hub is None:
            self._hub = Hub(str(ray.util.get_node_ip_address()), load().silence_s, self._died)
        return self._hub.text()

    def watch(self, inline: bool) -> None:
        """Watch by Ray as well those workers that are not connected."""
        connected = set(self._hub.ranks()) if self._hub else set()
        unseen = {
            handle.run_ref: handle.rank for handle in self._executor.ray_worker_handles if handle.rank not in connected
        }
        if not unseen:
            return
        logger.warning(
            "ranks %s could not connect to this node: their death is seen by Ray alone, later. See that no firewall "
            "stands between the nodes.",
            sorted(unseen.values()),
        )
        if inline:
            self._watch_by_ray(unseen)
        else:
            threading.Thread(target=self._watch_by_ray, args=(unseen,), daemon=True, name="RayAscendWatch").start()

    def end_workers(self) -> None:
        """End all workers: in order where all of them live, else at once. What does not end is left to be killed."""
        with self._lock:
            if self._ending and not self.first_death:
                return
            self._ending = True
        if self._hub is None:
            return
        failed = bool(self.first_death)
        self._hub.order(DIE if failed else STOP)
        late = self._hub.wait_until_gone(_DIE_LIMIT_S if failed else load().stop_grace_s)
        if late:
            logger.warning("ranks %s did not end in time and are killed", late)
        self._hub.close()
        self._hub = None
        buffers = [queue.buffer for queue in getattr(self._executor, "response_mqs", [])]
        remove(buffer.shared_memory.name for buffer in buffers if buffer is not None)

    def _died(self, rank: int, pid: int) -> None:
        """A worker is gone: tell the siblings, which would hang in HCCL, wake who waits for an answer, and say so."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            self.first_death = self._obituary(rank, pid)
        executor = self._executor
        executor.is_failed = True
        if self._hub is not None:
            self._hub.order(DIE)
        for queue in getattr(executor, "response_mqs", []):
            queue.cancel(WorkerDiedError(self.first_death))
        logger.error("%s", self.first_death)
        callback, executor.failure_callback = executor.failure_callback, None
        if callback is not None:
            callback()

    def _obituary(self, rank: int, pid: int) -> str:
        placed = next((each for each in getattr(self._executor, "ranks", []) if each.rank == rank), None)
        where = f" (node {placed.address}, NPU {placed.visible}, physical {placed.physical})" if placed else ""
        return (
            f"Worker process {pid} of rank {rank}{where} died. Its last words are in Ray's log folder there "
            f"(/tmp/ray/session_latest/logs/worker-*-{pid}.err), the kernel's, if it ran out of memory, in `dmesg`. "
            "All workers of the engine were stopped; start it again."
        )

    def _watch_by_ray(self, unseen: dict[Any, int]) -> None:
        """A call that blocks would crash if Ray were shut down under it: short ones, as upstream's."""
        import ray

        while not self._ending and ray.is_initialized():
            done, _ = ray.wait(list(unseen), num_returns=1, timeout=_RAY_POLL_S)
            if done and not self._ending:
                self._died(unseen[done[0]], pid=0)
                return
