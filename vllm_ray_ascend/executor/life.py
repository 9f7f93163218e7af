"""The life of an engine's workers as the executor sees it: watched, ended in order, or stopped at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ray_ascend.errors import VllmRayAscendError, WorkerDiedError, WorkerFailedError, WorkerLateError
from vllm_ray_ascend.executor.start import idle_text
from vllm_ray_ascend.lifecycle.hub import Hub, Loss, Peer
from vllm_ray_ascend.lifecycle.messages import DIE, READ, STOP
from vllm_ray_ascend.lifecycle.pulse import Pulse, Reports
from vllm_ray_ascend.lifecycle.shared_memory import remove
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

if TYPE_CHECKING:
    from vllm_ray_ascend.executor.executor import RayAscendExecutor

logger = get_logger(__name__)

_RAY_POLL_S = 1.0
_DIE_LIMIT_S = 1.0
_REPORT_LIMIT_S = 2.0
_LEAST_IDLE_S = 60.0
"""An idle process whose pages were dropped may need many seconds for a first answer on a machine that is overloaded."""


class Life:
    """Whether the workers of one executor live, and how they end."""

    def __init__(self, executor: RayAscendExecutor, hang_s: float) -> None:
        """``hang_s``: seconds after which a worker counts as hung."""
        self._executor = executor
        self._idle_s = max(hang_s, _LEAST_IDLE_S)
        self.pulse = Pulse(self.reports, self._idle_s, self._silent)
        self._hub: Hub | None = None
        self._changed = threading.Condition()
        self._ending = False
        self.cause: VllmRayAscendError | None = None
        """What ended the engine first, whatever the siblings of a dead worker say afterwards."""

    def hub_text(self) -> str:
        """Where workers find this executor. Ray must be joined."""
        import ray

        if self._hub is None:
            self._hub = Hub(str(ray.util.get_node_ip_address()), load().silence_s, self._lost)
        return self._hub.text()

    def peers(self) -> list[Peer]:
        """The workers that are connected."""
        return self._hub.peers() if self._hub else []

    def doing(self) -> dict[int, tuple[str, float]]:
        """For each connected rank the part of its start that is under way, and for how many seconds."""
        now = time.monotonic()
        return {peer.rank: (peer.doing, now - peer.since) for peer in self.peers()}

    def reports(self, limit_s: float = _REPORT_LIMIT_S) -> dict[int, str | None]:
        """What each connected rank says that it does; None for one that does not answer within ``limit_s`` seconds."""
        hub = self._hub
        return hub.ask(limit_s) if hub else {}

    def connect_post(self, ranks: int, read_by: Callable[[int], None]) -> bool:
        """Have ``read_by`` called with each rank that says that it has read; False where not all ``ranks`` can."""
        if self._hub is None or len(self._hub.ranks()) < ranks:
            return False
        self._hub.on_read = read_by
        return True

    def was_read(self, rank: int) -> None:
        """Tell a rank that what it sent last was read."""
        if (hub := self._hub) is not None:
            hub.tell(rank, READ)

    def check(self) -> None:
        """Raise what ended the engine, if it has ended."""
        if self.cause is not None:
            raise self.cause

    def wait_for_loss(self, limit_s: float) -> VllmRayAscendError | None:
        """What ended the engine, waited for: Ray may tell of a failure before the worker's own word arrives."""
        with self._changed:
            self._changed.wait_for(lambda: self.cause is not None, limit_s)
        return self.cause

    def watch(self, inline: bool) -> None:
        """Ask idle workers whether they live, and watch by Ray as well those that are not connected."""
        self.pulse.start()
        connected = {peer.rank for peer in self.peers()}
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

    def fail(self, cause: VllmRayAscendError, but: int | None = None) -> None:
        """End the engine: stop all workers ``but`` one, which would hang in HCCL, wake who waits for an answer, say so.

        Only the first cause counts. May be called in any thread.
        """
        with self._changed:
            if self._ending or self.cause is not None:
                return
            self.cause = cause
            executor = self._executor
            executor.is_failed = executor.shutting_down = True  # both, before the callback, as upstream's watch
            self._changed.notify_all()
        self.pulse.stop()
        callback, executor.failure_callback = getattr(executor, "failure_callback", None), None
        if self._hub is not None:
            self._hub.order(DIE, but)
        executor.wake(cause)
        if callback is not None:
            callback()
        logger.error("%s", cause)

    def end_workers(self) -> bool:
        """End all workers: in order where all of them live, else at once. What does not end is left to be killed.

        Whether this call did it, and no earlier one.
        """
        with self._changed:
            if self._ending:
                return False
            self._ending = True
        self.pulse.stop()
        if self._hub is None:
            return True
        late = self._hub.ranks()
        if self.cause is None:
            self._hub.order(STOP)
            late = self._hub.wait_until_gone(load().stop_grace_s)
        if late:
            segments = [name for peer in self._hub.peers() for name in peer.segments]
            self._hub.order(DIE)
            remove(segments)  # before the wait, which a second signal may end
            late = self._hub.wait_until_gone(_DIE_LIMIT_S)
        if late:
            logger.warning("ranks %s did not end in time and are killed", late)
        self._hub.close()
        self._hub = None
        return True

    def _lost(self, loss: Loss) -> None:
        remove(loss.segments)
        if loss.failure:
            text = f"rank {loss.rank} ({loss.where}) failed: {loss.failure}"
            self.fail(WorkerFailedError(text), but=loss.rank)
        else:
            self.fail(WorkerDiedError(_obituary(loss)))

    def _silent(self, reports: Reports) -> None:
        self.fail(WorkerLateError(idle_text(self._idle_s, reports)))

    def _watch_by_ray(self, unseen: dict[Any, int]) -> None:
        """A call that blocks would crash if Ray were shut down under it: short ones, as upstream's."""
        import ray

        while not self._ending and ray.is_initialized():
            done, _ = ray.wait(list(unseen), num_returns=1, timeout=_RAY_POLL_S)
            if done:
                self._lost(Loss(unseen[done[0]], 0, "node unknown", ""))
                return


def _obituary(loss: Loss) -> str:
    return (
        f"Worker process {loss.pid} of rank {loss.rank} ({loss.where}) died. Its last words are in Ray's log folder "
        f"there (/tmp/ray/session_latest/logs/worker-*-{loss.pid}.err), the kernel's, if it ran out of memory, in "
        "`dmesg`. All workers of the engine were stopped."
    )
