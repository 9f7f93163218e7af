"""The control connection between executor and workers: real processes, real sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.threads import in_thread
from vllm_ray_ascend.control.client import format_stack, server_location
from vllm_ray_ascend.control.ipc_resources import MAX_RESOURCES
from vllm_ray_ascend.control.protocol import (
    MAX_HELLO_BYTES,
    MAX_LINE_BYTES,
    STOP,
    TERMINATE,
    Command,
    Extension,
    Hello,
    IpcResource,
    SentinelHello,
    encode_message,
)
from vllm_ray_ascend.control.server import ControlServer, PeerLost
from vllm_ray_ascend.ipc.authentication import NONCE_BYTES, connect_authenticated
from vllm_ray_ascend.ipc.sockets import Address, connect, listen

pytestmark = pytest.mark.unit

LIMIT_S = 30.0
SEGMENT = "psm_0123abcd"
WORKER = """
import os, sys, time
from vllm_ray_ascend.control.client import ControlClient
from vllm_ray_ascend.control.protocol import DeviceOpened, Extension, IpcResource, PhaseStarted
def stop():
    print("stop", flush=True)
    os._exit(7)
def terminate(lost):
    os._exit(8 if lost else 9)
pipe = os.pipe()
client = ControlClient(sys.argv[1], int(sys.argv[2]), "10.0.0.9", 30.0, on_stop=stop, on_terminate=terminate,
    describe_activity=lambda: "testing", on_extension=lambda name: print(name, flush=True))
print("connected", flush=True)
for command in sys.stdin:
    exec(command)
time.sleep(600)
"""


class Losses:
    def __init__(self) -> None:
        self.seen: list[PeerLost] = []
        self._changed = threading.Condition()

    def __call__(self, loss: PeerLost) -> None:
        with self._changed:
            self.seen.append(loss)
            self._changed.notify_all()

    def wait(self, count: int) -> list[PeerLost]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, LIMIT_S)
        return self.seen


@pytest.fixture
def losses() -> Losses:
    return Losses()


@pytest.fixture
def server(losses: Losses) -> Iterator[ControlServer]:
    server = ControlServer("127.0.0.1", 30.0, losses)
    yield server
    server.close()


@pytest.fixture
def start(server: ControlServer) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(rank: int, first: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", first + WORKER, server.address_json(), str(rank)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "connected\n"
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def send_code(worker: subprocess.Popen[str], command: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(command + "\n")
    worker.stdin.flush()


def wait_for(check: Callable[[], bool]) -> None:
    for _ in range(int(LIMIT_S * 100)):
        if check():
            return
        threading.Event().wait(0.01)
    assert check()


def suspend(worker: subprocess.Popen[str]) -> None:
    """SIGSTOP, waited for: until some thread has taken the signal, the others run on."""
    worker.send_signal(signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in Path(f"/proc/{worker.pid}/status").read_text())


def wait_for_ranks(server: ControlServer, expected: list[int]) -> None:
    wait_for(lambda: server.connected_ranks() == expected)
    assert server.connected_ranks() == expected


def test_device_and_ipc_resources_of_a_dead_worker_are_reported(
    server: ControlServer, losses: Losses, start: Any
) -> None:
    worker = start(2)
    wait_for_ranks(server, [2])
    send_code(worker, f"client.send(DeviceOpened(5)); client.send(IpcResource({SEGMENT!r}))")
    wait_for(lambda: server.peers()[0].ipc_resources == [SEGMENT])
    worker.kill()
    assert losses.wait(1) == [PeerLost(2, worker.pid, "node 10.0.0.9, physical NPU 5", "", (SEGMENT,))]


def test_a_failure_is_reported_once_with_its_text_and_the_process_lives(
    server: ControlServer, losses: Losses, start: Any
) -> None:
    worker = start(0)
    wait_for_ranks(server, [0])
    send_code(worker, "client.report_failure(ValueError('a'), 'means b'); client.report_failure(ValueError('c'))")
    send_code(worker, "client.send(PhaseStarted('c'))")
    wait_for(lambda: server.peers()[0].phase == "c")
    assert losses.seen == [PeerLost(0, worker.pid, "node 10.0.0.9", "ValueError: a\nmeans b")]


def test_phases_of_a_startup_are_timed(server: ControlServer, start: Any) -> None:
    worker = start(0)
    wait_for_ranks(server, [0])
    for phase in ("one", "two", ""):
        send_code(worker, f"client.send(PhaseStarted({phase!r}))")
    wait_for(lambda: list(server.peers()[0].phase_seconds) == ["one", "two"])
    assert all(seconds >= 0 for seconds in server.peers()[0].phase_seconds.values())


def test_workers_report_their_status_and_a_suspended_one_does_not(server: ControlServer, start: Any) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(server, [0, 1])
    assert all(
        report is not None and "testing, at <string>" in report for report in server.request_reports(LIMIT_S).values()
    )
    suspend(workers[1])
    answers = server.request_reports(0.5)
    assert answers[0] is not None and answers[1] is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_death_is_detected_with_rank_and_process(
    server: ControlServer, losses: Losses, start: Any, number: signal.Signals
) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(server, [0, 1])
    workers[1].send_signal(number)
    assert losses.wait(1) == [PeerLost(1, workers[1].pid, "node 10.0.0.9", "")]
    wait_for_ranks(server, [0])
    assert len(losses.seen) == 1


def test_a_death_is_detected_though_the_process_s_files_stay_open(
    server: ControlServer, losses: Losses, start: Any
) -> None:
    """As while the kernel takes it apart: here a child that it forked has copies."""
    worker = start(3)
    wait_for_ranks(server, [3])
    wait_for(lambda: len(server._sentinels) == 2)
    send_code(worker, "child = os.fork() or time.sleep(600); print(child, flush=True)")
    child = int(worker.stdout.readline())
    try:
        worker.kill()
        assert losses.wait(1) == [PeerLost(3, worker.pid, "node 10.0.0.9", "")]
        assert server.wait_for_exit(0.2) == [3]
    finally:
        os.kill(child, signal.SIGKILL)
    assert server.wait_for_exit(LIMIT_S) == []
    assert len(losses.seen) == 1


def test_without_exit_sentinels_the_control_connection_detects_a_death(
    server: ControlServer, losses: Losses, start: Any
) -> None:
    refused = 0x10000000  # CLONE_NEWUSER, which the kernel gives to no thread of several
    worker = start(0, f"from vllm_ray_ascend.control import exit_sentinel; exit_sentinel._CLONE_FILES = {refused}")
    wait_for_ranks(server, [0])
    worker.kill()
    assert losses.wait(1) == [PeerLost(0, worker.pid, "node 10.0.0.9", "")]
    assert not server._sentinels


def test_sentinels_ignore_the_process_s_default_timeout_of_sockets(
    server: ControlServer, losses: Losses, start: Any
) -> None:
    start(0, "import socket; socket.setdefaulttimeout(0.05)")
    wait_for(lambda: len(server._sentinels) == 2)
    assert server.request_reports(LIMIT_S)[0] is not None
    assert len(server._sentinels) == 2 and losses.seen == []


def test_sentinels_hold_no_file_of_their_process(server: ControlServer, start: Any) -> None:
    worker = start(0)
    wait_for(lambda: len(server._sentinels) == 2)
    tables = [len(list((task / "fd").iterdir())) for task in Path(f"/proc/{worker.pid}/task").iterdir()]
    assert sorted(tables)[:3] == [4, 4, 6]


@pytest.mark.parametrize(("command", "code"), [(STOP, 7), (TERMINATE, 9)])
def test_a_command_reaches_every_worker(server: ControlServer, start: Any, command: Command, code: int) -> None:
    workers = [start(0), start(1), start(2)]
    wait_for_ranks(server, [0, 1, 2])
    server.broadcast(command)
    assert [worker.wait(LIMIT_S) for worker in workers] == [code] * 3
    assert server.wait_for_exit(LIMIT_S) == []


def test_a_suspended_process_is_not_gone_and_is_named_as_late(server: ControlServer, start: Any) -> None:
    worker = start(4)
    wait_for_ranks(server, [4])
    suspend(worker)
    server.broadcast(STOP)
    assert server.wait_for_exit(0.2) == [4]


def test_workers_terminate_when_their_executor_is_killed() -> None:
    code = f"""
import subprocess, sys, time
from vllm_ray_ascend.control.server import ControlServer
server = ControlServer("127.0.0.1", 30.0, lambda loss: None)
worker = subprocess.Popen(
    [sys.executable, "-c", {WORKER!r}, server.address_json(), "0"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(600)
"""
    executor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert executor.stdout is not None
    pid = int(executor.stdout.readline())
    descriptor = os.pidfd_open(pid)
    try:
        executor.kill()
        executor.communicate()
        import select

        assert select.select([descriptor], [], [], LIMIT_S)[0]
    finally:
        os.close(descriptor)


def test_workers_terminate_when_the_server_is_closed(server: ControlServer, losses: Losses, start: Any) -> None:
    worker = start(0)
    wait_for_ranks(server, [0])
    server.close()
    server.close()
    assert worker.wait(LIMIT_S) == 8
    assert losses.seen == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"type":"hello","token":"wrong","rank":0,"pid":1,"node":"n"}\n' * 2,
        b'{"type":"failed","text":"t"}\n',
    ],
)
def test_connections_without_the_token_are_rejected_and_are_no_loss(
    server: ControlServer, losses: Losses, start: Any, data: bytes
) -> None:
    with socket.create_connection((server.address.host, server.address.port)) as stranger:
        stranger.settimeout(LIMIT_S)
        stranger.sendall(data)
        with contextlib.suppress(OSError):  # the server may have closed the connection already
            stranger.shutdown(socket.SHUT_WR)
        assert len(received_until_closed(stranger)) <= NONCE_BYTES
    start(0)
    wait_for_ranks(server, [0])
    assert losses.seen == []


HELLO = encode_message(Hello(9, 1, "10.0.0.9"))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(HELLO[:-3], id="half a message"),
        pytest.param(b"x" * (MAX_HELLO_BYTES + 1), id="a long first line"),
        pytest.param(b"x" * (MAX_HELLO_BYTES + 1) + b"\n", id="a long first line that ends"),
        pytest.param(encode_message(Extension("e")), id="not Hello"),
        pytest.param(b'{"type":"hello","x":' + b"[" * 3000 + b"\n", id="nested"),
        pytest.param(HELLO + b'{"type":"failed","x":' + b"[" * 60000 + b"\n", id="Hello, then deeply nested"),
        pytest.param(HELLO + b'{"type":"failed","text":"\xff"}\n', id="Hello, then no UTF-8"),
        pytest.param(HELLO + b"x" * (MAX_LINE_BYTES + 1), id="Hello, then an endless line"),
        pytest.param(encode_message(SentinelHello(9, 1)) + b"x\n", id="a sentinel that speaks"),
    ],
)
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_whatever_a_peer_sends_ends_at_most_its_own_connection(
    server: ControlServer, losses: Losses, start: Any, data: bytes, ending: str
) -> None:
    worker = start(0)
    wait_for_ranks(server, [0])
    peer = connect_authenticated(server.address, LIMIT_S)
    with contextlib.suppress(ConnectionError):  # it is cut off while it sends
        peer.sendall(data)
    if ending == "reset":
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    start(1)
    wait_for_ranks(server, [0, 1])
    worker.kill()
    wait_for(lambda: PeerLost(0, worker.pid, "node 10.0.0.9", "") in losses.seen)
    assert {loss.rank for loss in losses.seen} <= {0, 9}


def test_deaths_are_reported_while_there_are_no_files_for_new_connections(
    server: ControlServer, losses: Losses, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(0)
    wait_for_ranks(server, [0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [socket.socket()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0].fileno() + 16, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(socket.socket())
        opened.pop().close()
        waiting = socket.create_connection((server.address.host, server.address.port))
        wait_for(lambda: "VRA-330" in caplog.text)
        worker.kill()
        losses.wait(1)
        waiting.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in opened:
            each.close()
    start(1)
    wait_for_ranks(server, [1])
    assert caplog.text.count("VRA-330") == 1


def test_an_error_of_a_callback_is_reported_and_the_server_serves_on(start: Any, server: ControlServer) -> None:
    found: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    server._on_error = found.put
    server._on_peer_lost = server.on_extension = raise_error
    worker = start(0)
    send_code(worker, "client.send(Extension('e'))")
    assert str(found.get(timeout=LIMIT_S)) == "a callback failed"
    worker.kill()
    assert str(found.get(timeout=LIMIT_S)) == "a callback failed"
    start(1)
    wait_for_ranks(server, [1])


def test_an_error_of_the_server_itself_is_reported_and_ends_its_clients(
    start: Any, server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    server._on_error = found.put
    worker = start(0)
    wait_for_ranks(server, [0])
    monkeypatch.setattr(server, "_handle_message", raise_error)
    send_code(worker, "client.send(DeviceOpened(5))")
    assert str(found.get(timeout=LIMIT_S)) == "a callback failed"
    assert worker.wait(LIMIT_S) == 8
    with pytest.raises(OSError, match=r"refused|reset|VRA-590"):
        connect_authenticated(server.address, 1.0)


def raise_error(*_: object) -> Any:
    raise ValueError("a callback failed")


def test_a_peer_that_reads_nothing_holds_up_nobody(server: ControlServer, losses: Losses) -> None:
    with connect_authenticated(server.address, LIMIT_S) as peer:
        peer.sendall(HELLO)
        wait_for_ranks(server, [9])
        sending, _ = in_thread(lambda: list(map(server.broadcast, [Extension("x" * 100_000)] * 200)))
        sending.join(LIMIT_S)
        assert not sending.is_alive()
        assert [loss.rank for loss in losses.wait(1)] == [9]


def test_a_worker_that_exits_is_not_waited_for(server: ControlServer, start: Any) -> None:
    workers = [start(0), start(1)]
    wait_for_ranks(server, [0, 1])
    suspend(workers[1])
    thread, found = in_thread(lambda: server.request_reports(600.0))
    wait_for(lambda: bool(server._requests) and server.peers()[0].report is not None)
    workers[1].kill()
    thread.join(LIMIT_S)
    (reports,) = found
    assert isinstance(reports, dict) and reports[0] is not None and reports[1] is None


def test_only_names_of_our_own_making_are_accepted(losses: Losses) -> None:
    server = ControlServer("127.0.0.1", 30.0, losses, socket_folder="/tmp/")
    path = f"/tmp/{uuid.uuid4()}"
    names = [SEGMENT, path, "/etc/passwd", "../etc/passwd", "psm_0123abcd/../x", "/tmp/x", f"/var/{uuid.uuid4()}"]
    with connect_authenticated(server.address, LIMIT_S) as peer:
        peer.sendall(HELLO + b"".join(encode_message(IpcResource(name)) for name in names))
        peer.sendall(encode_message(IpcResource(SEGMENT)) * 200)
    (loss,) = losses.wait(1)
    assert set(loss.ipc_resources) == {SEGMENT, path} and len(loss.ipc_resources) == MAX_RESOURCES
    server.close()


def test_the_token_is_neither_sent_nor_shown(server: ControlServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = server.address.token
    sent: list[bytes] = []
    with listen("127.0.0.1") as relay:
        address = Address("127.0.0.1", relay.getsockname()[1], token)
        connecting, found = in_thread(lambda: connect_authenticated(address, LIMIT_S))
        inner, _ = relay.accept()
        with inner, connect(server.address) as outer:
            for source, target, size in ((outer, inner, 32), (inner, outer, 64), (outer, inner, 32)):
                sent.append(source.recv(size, socket.MSG_WAITALL))
                target.sendall(sent[-1])
            connecting.join(LIMIT_S)
            assert isinstance(found[0], socket.socket), found
            found[0].sendall(HELLO)
            sent.append(inner.recv(4096))
            found[0].close()
    assert token.encode() not in b"".join(sent)
    with pytest.raises(ConnectionError) as error:
        connect_authenticated(Address("127.0.0.1", server.address.port, token[::-1] + "0"), LIMIT_S)
    shown = [server.address, error.value, server_location(server.address_json())]
    assert token not in f"{shown} {' '.join(map(str, shown))} {caplog.text}"


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6")
@pytest.mark.parametrize(("host", "location"), [("::1", "[::1]"), ("[::1]", "[::1]"), ("localhost", "localhost")])
def test_a_server_listens_at_a_name_and_at_ipv6_in_any_form(losses: Losses, host: str, location: str) -> None:
    server = ControlServer(host, 30.0, losses)
    with connect_authenticated(server.address, LIMIT_S) as peer:
        peer.sendall(HELLO)
        wait_for_ranks(server, [9])
    assert losses.wait(1)[0].rank == 9
    assert server_location(server.address_json()) == f"{location}:{server.address.port}"
    server.close()


def received_until_closed(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(4096):
            received += data
    return received


def test_no_server_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        text = f'{{"host":"127.0.0.1","port":{unused.getsockname()[1]},"token":"t"}}'
        done = subprocess.run(
            [sys.executable, "-c", WORKER, text, "0"], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    assert "ConnectionRefusedError" in done.stderr


def test_extensions_are_passed_on_both_ways(
    server: ControlServer, start: Callable[[int], subprocess.Popen[str]]
) -> None:
    server.on_extension = lambda rank, name: server.send(rank - 1, Extension(f"{name} from {rank}"))
    sender, reader = start(0), start(1)
    assert reader.stdin is not None and sender.stdout is not None
    reader.stdin.write("client.send(Extension('hello'))\n")
    reader.stdin.flush()
    assert sender.stdout.readline() == "hello from 1\n"


def test_the_stack_of_a_thread_that_runs_is_returned() -> None:
    """The thread calls and returns meanwhile, as a worker does that imports modules while it is asked."""
    stopped = threading.Event()

    def run(depth: int) -> None:
        if depth:
            run(depth - 1)

    def work() -> None:
        while not stopped.is_set():
            run(20)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        stacks = [format_stack(thread.ident) for _ in range(2000)]
        wait_for(lambda: format_stack(thread.ident).endswith(" run"))
    finally:
        stopped.set()
        thread.join()
    assert all(" > " in stack and stack.count(" > ") < 6 for stack in stacks)
    assert any("test_control.py:" in stack for stack in stacks)
    assert format_stack(None) == format_stack(-1) == ""
