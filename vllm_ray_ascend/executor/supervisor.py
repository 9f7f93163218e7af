"""Supervision of an engine's workers: detects that one has failed, then stops them gracefully or terminates them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ray_ascend.cluster.probe import live_node_addresses
from vllm_ray_ascend.control.health_check import IdleHealthCheck, Reports
from vllm_ray_ascend.control.protocol import STOP, TERMINATE, EventReported, Extension
from vllm_ray_ascend.control.server import ControlServer, Peer, PeerLost
from vllm_ray_ascend.control.timeouts import stop_grace_s
from vllm_ray_ascend.errors import (
    ControlServerError,
    HeadLostError,
    VllmRayAscendError,
    WorkerDiedError,
    WorkerFailedError,
    WorkerLateError,
)
from vllm_ray_ascend.executor.death_cause import (
    gcs_obstacle,
    head_gone_message,
    head_lost_message,
    head_silent_message,
    ray_failure,
    reconnect_limit_s,
)
from vllm_ray_ascend.executor.diagnostics import idle_message, worker_died_message
from vllm_ray_ascend.executor.failure_record import create_record, write_record
from vllm_ray_ascend.ipc.shared_memory import remove_files
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import ENGINE_FAILED, EVENTS, GRAPHS_CAPTURED, HEAD_BACK, HEAD_LOST, KINDS
from vllm_ray_ascend.observability.metrics import (
    FAILURE_DETECTION,
    FAILURE_INFO,
    FAILURE_TIME,
    FAILURES,
    FALLBACKS,
    GRAPHS,
    RANKS,
    RANKS_ALIVE,
    ROUND_TRIP,
    VALUES,
)
from vllm_ray_ascend.settings import Settings

logger = get_logger(__name__)

_RAY_POLL_S = 1.0
_RAY_REPORT_LIMIT_S = 3.0
_HEAD_POLL_S = 10.0
_HEAD_POLLS = 5
"""Looks at the head, at least, within Ray's limit for one that is gone."""
_HEAD_GONE_POLL_S = 1.0
_ENGINE_END_S = 5.0
"""How long an engine needs for an orderly end."""
_TERMINATE_LIMIT_S = 1.0
_REPORT_LIMIT_S = 2.0
_LAST_REPORTS_S = 2.0
"""How long siblings may take to say what they were doing, and to exit, after a failure."""
_CAUSE_LIMIT_S = 5.0
"""More than the look at Ray's head takes by which the cause of a death is found out."""
_MIN_IDLE_LIMIT_S = 60.0
"""An idle process whose pages were dropped may need many seconds for a first answer on an overloaded machine."""


class WorkerSupervisor:
    """Whether the workers of one engine live, and how they are stopped. It knows nothing of the executor."""

    def __init__(
        self,
        worker_handles: Callable[[], Sequence[Any]],
        settings: Settings,
        hang_s: float,
        *,
        processes: int = 1,
        socket_folder: str = "",
        mark_failed: Callable[[], None] = lambda: None,
        on_failure: Callable[[VllmRayAscendError], None] = lambda _: None,
    ) -> None:
        """Supervise vLLM's ``worker_handles()``, once they exist. ``hang_s``: seconds until a worker counts as hung.

        ``processes`` is the number of workers, ``socket_folder`` where vLLM has the sockets of its queues.

        Both callbacks are called once, in the thread that has detected the first failure. ``mark_failed()`` is called
        before any other thread can wait for workers to be stopped, and must not block; ``on_failure(cause)`` once the
        workers have been ordered to terminate.
        """
        self._worker_handles = worker_handles
        self._settings = settings
        self._processes = processes
        self._socket_folder = socket_folder
        self._idle_limit_s = max(hang_s, _MIN_IDLE_LIMIT_S)
        self._mark_failed = mark_failed
        self._on_failure = on_failure
        self.health_check = IdleHealthCheck(self.request_reports, self._idle_limit_s, self._handle_silent_workers)
        self._server: ControlServer | None = None
        self._gcs_address = ""
        self._reconnect_s = reconnect_limit_s(os.environ)
        self._background: list[threading.Thread] = []
        """Threads that follow a failure."""
        self._changed = threading.Condition()
        self._monitoring = False
        self._stopping = False
        self._failing = False
        """From the first failure on; its cause may follow."""
        self.cause: VllmRayAscendError | None = None
        """The first failure, whatever the siblings of a dead worker report afterwards."""

    def control_address(self) -> str:
        """Return the address of the control server, for workers."""
        import ray

        if self._server is None:
            host = str(ray.util.get_node_ip_address())
            if ray.is_initialized():  # else, as in a benchmark, there is no head to watch, and asking would start one
                self._gcs_address = str(ray.get_runtime_context().gcs_address)
            warn_if_unencrypted(os.environ)
            self._server = ControlServer(
                host,
                self._settings.silence_s,
                self._handle_lost_worker,
                processes=self._processes,
                socket_folder=self._socket_folder,
                on_error=self._handle_server_error,
            )
            self._server.on_event = _handle_event
            VALUES.set(RANKS, self._processes)
            VALUES.on_read(self._refresh_values)
        return self._server.address_json()

    def connected_workers(self) -> list[Peer]:
        """Return the workers that are connected, by rank."""
        return self._server.peers() if self._server else []

    def current_phases(self) -> dict[int, tuple[str, float]]:
        """Return, for each connected rank, the phase of its startup and the seconds since the phase began."""
        now = time.monotonic()
        return {peer.rank: (peer.phase, now - peer.phase_started_at) for peer in self.connected_workers()}

    def request_reports(self, limit_s: float = _REPORT_LIMIT_S) -> dict[int, str | None]:
        """Return what each connected rank is doing; None for one that does not answer within ``limit_s`` seconds."""
        server = self._server
        return server.request_reports(limit_s) if server else {}

    def _refresh_values(self) -> None:
        """Ask the workers how they are, for the metrics. A worker that does not answer now is alive all the same."""
        if self._monitoring and not self._failing and not self._stopping:  # not while they start, and are busy
            self.request_reports()
        workers = self.connected_workers()
        VALUES.set(RANKS_ALIVE, len(workers))
        if answers := [peer.round_trip_s for peer in workers if peer.round_trip_s is not None]:
            VALUES.set(ROUND_TRIP, max(answers))

    def set_extension_handler(self, handler: Callable[[int, str], None]) -> None:
        """Call ``handler`` with rank and name of each Extension that a connected worker sends from now on."""
        if (server := self._server) is not None:
            server.on_extension = handler

    def send_extension(self, rank: int, name: str) -> None:
        """Send an Extension to a rank, if it is connected."""
        if (server := self._server) is not None:
            server.send(rank, Extension(name))

    def raise_if_failed(self) -> None:
        """Raise the first failure, if there is one."""
        if self.cause is not None:
            raise self.cause

    def wait_for_failure(self, limit_s: float) -> VllmRayAscendError | None:
        """Return the first failure, waiting ``limit_s`` seconds: Ray's error may arrive before the worker's report.

        None comes once the workers are being stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.cause is not None or self._failing or self._stopping, limit_s)
            self._wait_for_cause()
        return self.cause

    def start_monitoring(self, inline: bool) -> None:
        """Start the health check of idle workers; monitor through Ray the workers without a control connection."""
        self._monitoring = True
        self.health_check.start()
        if self._gcs_address:
            threading.Thread(
                target=self._monitor_head,
                args=(self._reconnect_s,),
                daemon=True,
                name="RayAscendHeadMonitor",
            ).start()
        connected = {peer.rank for peer in self.connected_workers()}
        unconnected = {handle.run_ref: handle for handle in self._worker_handles() if handle.rank not in connected}
        if not unconnected:
            return
        logger.warning(
            "VRA-319: ranks %s could not connect to this node: their exit is detected by Ray alone, later. Check that "
            "no firewall stands between the nodes.",
            sorted(handle.rank for handle in unconnected.values()),
        )
        if inline:
            self._monitor_by_ray(unconnected)
        else:
            threading.Thread(
                target=self._monitor_by_ray, args=(unconnected,), daemon=True, name="RayAscendRayMonitor"
            ).start()

    def fail(self, cause: VllmRayAscendError, exclude: int | None = None) -> None:
        """End the engine: terminate all workers but ``exclude``, which would hang in HCCL, and report the failure.

        Only the first cause counts. May be called in any thread.
        """
        self._fail(lambda: cause, exclude)

    def _fail(
        self, find_cause: Callable[[], VllmRayAscendError], exclude: int | None = None, loss: PeerLost | None = None
    ) -> bool:
        """Do what `fail` does, and find out the cause once the siblings have their order, as that takes a while.

        Return whether this was the first failure. Where it was not, the cause of the first one is known on return.
        """
        detection_s = self._detection_s(loss)
        with self._changed:
            if self._failing or self._stopping:
                self._wait_for_cause()
                return False
            self._failing = True
            self._mark_failed()
        run_each(self.health_check.stop, lambda: self._terminate_workers(exclude))
        cause = find_cause()
        with self._changed:
            self.cause = cause
            self._changed.notify_all()
        run_each(
            lambda: self._on_failure(cause),
            lambda: logger.error("%s", cause),
            lambda: self._report_failure(cause, loss, detection_s),
        )
        return True

    def _detection_s(self, loss: PeerLost | None) -> float:
        """Return the seconds since the last sign of life: of the rank that is lost, or of all, the end of a step."""
        signs = [self.health_check.last_completion_at, *([loss.heard_at] if loss and loss.heard_at else [])]
        return time.monotonic() - max(signs)

    def _report_failure(self, cause: VllmRayAscendError, loss: PeerLost | None, detection_s: float) -> None:
        """Report a failure that has been handled: as an event, in the metrics and, a moment later, in its record."""
        VALUES.add(FAILURES)
        VALUES.set_info(FAILURE_INFO, [(cause.code,)])
        VALUES.set(FAILURE_DETECTION, detection_s)
        VALUES.set(FAILURE_TIME, time.time())
        rank, location = (None, "") if loss is None else (loss.rank, loss.location)
        fields = {"code": cause.code, "cause": str(cause), "rank": rank, "location": location}
        EVENTS.emit(ENGINE_FAILED, **fields, detection_seconds=detection_s)
        if server := self._server:
            self._start_background(lambda: _record_failure(cause, detection_s, server), "RayAscendFailureRecord")

    def _start_background(self, call: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=call, daemon=True, name=name)
        self._background.append(thread)
        thread.start()

    def _wait_for_cause(self) -> None:
        """Wait, with the lock, until the cause of a failure that another thread has begun to report is known."""
        self._changed.wait_for(lambda: self.cause is not None or not self._failing, _CAUSE_LIMIT_S)

    def stop_workers(self) -> bool:
        """Stop all workers: gracefully where all of them live, else immediately. Those that do not exit must be killed.

        Return False where an earlier call has done it.
        """
        with self._changed:
            if self._stopping:
                return False
            self._stopping = True
            self._changed.notify_all()
        self.health_check.stop()
        if self._server is None:
            return True
        late = self._server.connected_ranks()
        if not self._failing:
            self._server.broadcast(STOP)
            late = self._server.wait_for_exit(stop_grace_s(self._settings.stop_grace_s, self._processes))
        if late:
            ipc_resources = [name for peer in self._server.peers() for name in peer.ipc_resources]
            self._server.broadcast(TERMINATE)
            remove_files(ipc_resources)  # before the wait, which a second signal may end
            late = self._server.wait_for_exit(_TERMINATE_LIMIT_S)
        if late:
            logger.warning("VRA-320: ranks %s did not exit in time and are killed", late)
        self._server.close()
        self._server = None
        for thread in self._background:
            thread.join(_RAY_REPORT_LIMIT_S)
        return True

    def _handle_lost_worker(self, loss: PeerLost) -> None:
        remove_files(loss.ipc_resources)
        if loss.failure:
            text = f"rank {loss.rank} ({loss.location}) failed: {loss.failure}"
            self._fail(lambda: WorkerFailedError("VRA-321", text), loss.rank, loss)
        else:
            self._fail_dead(loss)

    def _fail_dead(self, loss: PeerLost) -> None:
        """End the engine, a worker process of which has died: by itself, or because Ray's head is gone."""
        if self._fail(lambda: self._death_error(loss), loss=loss):
            self._log_ray_failure(loss.rank)

    def _death_error(self, loss: PeerLost) -> VllmRayAscendError:
        """Return the error for a worker process that has died, after a look at Ray's head, which may take a second."""
        text = worker_died_message(loss)
        if obstacle := self._head_obstacle():
            return HeadLostError("VRA-360", head_lost_message(self._gcs_address, obstacle, self._reconnect_s, text))
        return WorkerDiedError("VRA-322", text)

    def _head_obstacle(self) -> str | None:
        return gcs_obstacle(self._gcs_address) if self._gcs_address else None

    def _log_ray_failure(self, rank: int) -> None:
        """Log why Ray killed a worker, which Ray reports later than the death is known."""
        references = [handle.run_ref for handle in self._worker_handles() if handle.rank == rank]
        if not references or references[0] is None:
            return

        def log() -> None:
            if not self._head_obstacle() and (reason := ray_failure(references[0], _RAY_REPORT_LIMIT_S)):
                logger.error("VRA-361: rank %d died: %s", rank, reason)

        self._start_background(log, "RayAscendDeathCause")

    def _terminate_workers(self, exclude: int | None) -> None:
        if (server := self._server) is not None:
            server.broadcast(TERMINATE, exclude)

    def _handle_server_error(self, error: Exception) -> None:
        """End the engine: without the control server the next death of a worker would be a hang."""
        logger.info("the control server's error", exc_info=error)
        text = f"the control server of this engine failed: {type(error).__name__}: {error}"
        self.fail(ControlServerError("VRA-335", text))

    def _handle_silent_workers(self, reports: Reports) -> None:
        self.fail(WorkerLateError("VRA-323", idle_message(self._idle_limit_s, reports)))

    def _monitor_head(self, limit_s: float, poll_s: float = _HEAD_POLL_S) -> None:
        """Log that Ray's head is gone, and that it is back. The engine serves on meanwhile.

        ``limit_s`` seconds after the loss Ray ends all processes at once, engine core and workers: no request would get
        the cause, and nobody would remove the files of their queues. So the engine ends a moment earlier, in order.
        """
        answered_at, was_gone = time.monotonic(), False
        poll_s = min(poll_s, max(limit_s / _HEAD_POLLS, _HEAD_GONE_POLL_S))
        while True:
            with self._changed:
                wait_s = min(poll_s, _HEAD_GONE_POLL_S) if was_gone else poll_s
                if self._changed.wait_for(lambda: self._stopping or self.cause is not None, wait_s):
                    return
            asked_at = time.monotonic()
            obstacle = self._head_obstacle()
            if obstacle and not was_gone:
                logger.error("VRA-362: %s", head_silent_message(self._gcs_address, obstacle, limit_s))
                EVENTS.emit(HEAD_LOST, address=self._gcs_address)
            elif was_gone and not obstacle:
                logger.warning("VRA-363: Ray's head (GCS) at %s answers again", self._gcs_address)
                EVENTS.emit(HEAD_BACK, address=self._gcs_address)
            was_gone = bool(obstacle)
            if not obstacle:
                answered_at = asked_at
            elif (gone_s := asked_at - answered_at) > limit_s - _ENGINE_END_S:
                text = head_gone_message(self._gcs_address, obstacle, gone_s, limit_s)
                self.fail(HeadLostError("VRA-388", text))

    def _monitor_by_ray(self, handles: dict[Any, Any]) -> None:
        """Detect the exit of workers through the references of their `run` calls, with short waits, as upstream does.

        A wait that blocks would crash if Ray were shut down in it.
        """
        import ray

        addresses = live_node_addresses()
        while not self._stopping and ray.is_initialized():
            done, _ = ray.wait(list(handles), num_returns=1, timeout=_RAY_POLL_S)
            if done:
                handle = handles[done[0]]
                location = f"node {addresses.get(handle.node_id, handle.node_id)}"
                self._handle_lost_worker(PeerLost(handle.rank, 0, location, ray_failure(done[0])))
                return


def _handle_event(rank: int, event: EventReported) -> None:
    """Emit an event that a worker has sent, and count it. One of another version of this package is ignored."""
    kind = KINDS.get(event.name)
    if kind is None:
        return
    VALUES.add(*(GRAPHS, float(event.fields.get("graphs") or 0)) if kind is GRAPHS_CAPTURED else (FALLBACKS, 1.0))
    EVENTS.emit(kind, **{**event.fields, "rank": rank})


def _record_failure(cause: VllmRayAscendError, detection_s: float, server: ControlServer) -> None:
    """Write the record of a failure, once all workers have exited: each says before what it was doing."""
    server.wait_for_exit(_LAST_REPORTS_S)
    path = write_record(create_record(cause.code, str(cause), detection_s, server.latest_peers()))
    if path is not None:
        logger.info("the failure is recorded in %s, for `vllm-ray-ascend bundle`", path)


def warn_if_unencrypted(environ: Mapping[str, str]) -> None:
    """Log that only Ray's own connections are encrypted, where the user has asked Ray for TLS.

    Reasons: docs/decisions/0008-control-connections-without-tls.md.
    """
    if environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # as Ray reads it
        logger.warning(
            "VRA-337: RAY_USE_TLS=1 encrypts Ray's own connections. Those of this engine between nodes (control, "
            "message queues, HCCL) are authenticated at most, and not encrypted: encrypt the network between the nodes "
            "itself, as with WireGuard or IPsec."
        )


def run_each(*calls: Callable[[], object]) -> None:
    """Make all calls, also those after one that raises: that is logged. For what must happen once an engine failed."""
    for call in calls:
        try:
            call()
        except Exception:  # whatever it is, the following calls are still needed
            logger.exception("VRA-336: a part of what follows a failure of the engine failed itself")
