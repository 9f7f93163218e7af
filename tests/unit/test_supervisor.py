"""A supervisor without an executor: which failure counts, and who is notified in which order."""

from __future__ import annotations

import logging
import socket
import threading
import time

import pytest

from tests.threads import in_thread
from vllm_ray_ascend.control.client import ControlClient
from vllm_ray_ascend.control.server import ControlServer, PeerLost
from vllm_ray_ascend.errors import ControlServerError, HeadLostError, VllmRayAscendError, WorkerDiedError
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor, run_each, warn_if_unencrypted
from vllm_ray_ascend.observability.events import EVENTS, Event
from vllm_ray_ascend.observability.metrics import FAILURE_DETECTION, FAILURE_INFO, VALUES
from vllm_ray_ascend.settings import Settings

pytestmark = pytest.mark.unit

LIMIT_S = 30.0


class Owner:
    """Records the callbacks of its supervisor."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.supervisor = WorkerSupervisor(
            list, Settings(), 240.0, mark_failed=lambda: self.events.append("mark"), on_failure=self.on_failure
        )

    def on_failure(self, cause: VllmRayAscendError) -> None:
        self.events.append(f"{cause}, {self.supervisor.wait_for_failure(0) is cause}")


def test_only_the_first_failure_is_reported() -> None:
    owner = Owner()
    owner.supervisor.raise_if_failed()
    owner.supervisor.fail(WorkerDiedError("VRA-1", "first"))
    owner.supervisor.fail(WorkerDiedError("VRA-1", "second"))
    assert owner.events == ["mark", "VRA-1: first, True"]
    with pytest.raises(WorkerDiedError, match="first"):
        owner.supervisor.raise_if_failed()


def test_a_failure_wakes_who_waits_for_it() -> None:
    owner = Owner()
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(owner.supervisor.wait_for_failure(LIMIT_S)))
    waiting.start()
    owner.supervisor.fail(WorkerDiedError("VRA-1", "first"))
    waiting.join(LIMIT_S)
    assert found == [owner.supervisor.cause]


def test_an_error_of_the_owner_s_callback_is_logged_and_the_cause_stays(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: VllmRayAscendError) -> None:
        raise OSError("no memory")

    supervisor = WorkerSupervisor(list, Settings(), 240.0, on_failure=fail)
    supervisor.fail(WorkerDiedError("VRA-1", "first"))
    assert str(supervisor.cause) == "VRA-1: first"
    assert "VRA-336" in caplog.text and "no memory" in caplog.text and "VRA-1: first" in caplog.text


def test_each_call_is_made_though_one_before_it_raises() -> None:
    made: list[int] = []
    run_each(lambda: made.append(1), lambda: 1 / 0, lambda: made.append(2))
    assert made == [1, 2]


def test_an_error_of_the_control_server_ends_the_engine_with_its_cause() -> None:
    owner = Owner()
    owner.supervisor._handle_server_error(OSError(24, "Too many open files"))
    assert isinstance(owner.supervisor.cause, ControlServerError)
    assert "VRA-335" in owner.events[1] and "Too many open files" in owner.events[1]


def test_nobody_waits_for_a_failure_of_workers_that_are_being_stopped() -> None:
    owner = Owner()
    waiting = threading.Thread(target=owner.supervisor.wait_for_failure, args=(10 * LIMIT_S,))
    waiting.start()
    owner.supervisor.stop_workers()
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()


def test_after_a_stop_nothing_fails_and_a_second_stop_does_nothing() -> None:
    owner = Owner()
    assert owner.supervisor.stop_workers()
    assert not owner.supervisor.stop_workers()
    owner.supervisor.fail(WorkerDiedError("VRA-1", "late"))
    assert owner.events == [] and owner.supervisor.cause is None


def lose_worker(owner: Owner, gcs_address: str) -> None:
    """Let a worker be lost, in an engine of the Ray cluster at ``gcs_address``."""
    owner.supervisor._gcs_address = gcs_address
    owner.supervisor._handle_lost_worker(PeerLost(1, 7, "node 10.0.0.2", ""))


def test_a_death_is_that_of_ray_s_head_where_this_is_gone() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        alone = Owner()
        lose_worker(alone, address)
    assert str(alone.supervisor.cause).startswith("VRA-322: Worker process 7 of rank 1 ")
    owner = Owner()
    lose_worker(owner, address)
    assert str(owner.supervisor.cause).startswith(
        f"VRA-360: Ray's head (GCS) at {address} is gone (Connection refused)"
    )
    assert "Worker process 7 of rank 1 " in str(owner.supervisor.cause)


class PatientSupervisor(WorkerSupervisor):
    """A supervisor whose look at Ray's head lasts until a sibling of the dead worker was ordered to terminate."""

    def __init__(self, terminated: threading.Event) -> None:
        super().__init__(list, Settings(), 240.0)
        self.looking, self.terminated = threading.Event(), terminated

    def _death_error(self, loss: PeerLost) -> VllmRayAscendError:
        self.looking.set()
        assert self.terminated.wait(LIMIT_S), "the sibling continues while the cause is looked for"
        return super()._death_error(loss)


def test_siblings_are_terminated_before_the_cause_of_a_death_is_known() -> None:
    """Who fails or asks meanwhile waits for the first cause."""
    terminated = threading.Event()
    supervisor = PatientSupervisor(terminated)
    server = supervisor._server = ControlServer("127.0.0.1", 30.0, supervisor._handle_lost_worker)
    sibling = ControlClient(
        server.address_json(),
        0,
        "127.0.0.1",
        30.0,
        on_stop=lambda: None,
        on_terminate=lambda lost: terminated.set(),
        describe_activity=lambda: "waiting in HCCL",
    )
    while not server.connected_ranks():
        time.sleep(0.01)
    reporting, _ = in_thread(lambda: supervisor._handle_lost_worker(PeerLost(1, 7, "node 10.0.0.2", "")))
    assert supervisor.looking.wait(LIMIT_S)
    supervisor.fail(WorkerDiedError("VRA-1", "what follows"))
    assert "VRA-322: Worker process 7 of rank 1 " in str(supervisor.cause)
    assert supervisor.wait_for_failure(0) is supervisor.cause
    reporting.join(LIMIT_S)
    sibling.close()
    server.close()


def test_a_worker_that_exits_while_all_are_stopped_does_not_ask_for_ray_s_head() -> None:
    owner = Owner()
    owner.supervisor.stop_workers()
    with socket.create_server(("127.0.0.1", 0)) as head:
        lose_worker(owner, f"127.0.0.1:{head.getsockname()[1]}")
        head.settimeout(0)
        with pytest.raises(BlockingIOError):
            head.accept()
    assert owner.events == []


def test_a_head_that_is_gone_and_comes_back_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()
    with socket.socket() as head:
        head.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        head.bind(("127.0.0.1", 0))
        port = head.getsockname()[1]
        owner.supervisor._gcs_address = f"127.0.0.1:{port}"
        monitor = threading.Thread(target=owner.supervisor._monitor_head, args=(600.0, 0.01))
        monitor.start()
        try:
            wait_for_text(caplog, f"VRA-362: Ray's head (GCS) at 127.0.0.1:{port} does not answer (Connection refused)")
            assert "600 s after the loss" in caplog.text
            head.listen()
            wait_for_text(caplog, f"VRA-363: Ray's head (GCS) at 127.0.0.1:{port} answers again")
        finally:
            owner.supervisor.fail(WorkerDiedError("VRA-1", "a failure ends the monitor"))
            monitor.join(LIMIT_S)
    assert not monitor.is_alive()
    assert caplog.text.count("VRA-362") == caplog.text.count("VRA-363") == 1


def test_an_engine_ends_before_ray_ends_its_processes() -> None:
    owner = Owner()
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))  # it does not listen
        owner.supervisor._gcs_address = f"127.0.0.1:{head.getsockname()[1]}"
        owner.supervisor._monitor_head(6.0, 0.01)
    assert owner.events[0] == "mark"
    (event,) = owner.events[1:]
    assert event.startswith("VRA-388: the engine ends because Ray's head (GCS) at 127.0.0.1:")
    assert isinstance(owner.supervisor.cause, HeadLostError)


def wait_for_text(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


@pytest.mark.parametrize(("value", "warns"), [("1", True), ("True", True), ("0", False), ("", False), (None, False)])
def test_unencrypted_connections_are_reported_where_ray_has_tls(
    value: str | None, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    warn_if_unencrypted({} if value is None else {"RAY_USE_TLS": value})
    assert ("VRA-337" in caplog.text) is warns


def test_a_failure_is_reported_as_event_and_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection is counted from the last sign of life: of the lost rank, or of all ranks the end of a step."""
    heard: list[Event] = []
    monkeypatch.setattr(EVENTS, "_listeners", [heard.append])
    owner = Owner()
    owner.supervisor.health_check.last_completion_at = time.monotonic() - 1000
    loss = PeerLost(3, 42, "node 10.0.0.9, physical NPU 1", "", heard_at=time.monotonic() - 100)
    owner.supervisor._handle_lost_worker(loss)
    (event,) = heard
    assert (event.event, event.fields["code"], event.fields["rank"]) == ("engine_failed", "VRA-322", 3)
    assert event.fields["location"] == loss.location
    detection_s = event.fields["detection_seconds"]
    assert isinstance(detection_s, float) and 100 <= detection_s < 1000
    values = {(sample.name, sample.labels): sample.value for sample in VALUES.read()}
    assert values[FAILURE_DETECTION.name, ()] == detection_s and values[FAILURE_INFO.name, ("VRA-322",)] == 1
