"""What `make serve` asks for and how it reads a server's log, without a server."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from demo.forward import Forwarder
from demo.options import DemoError, npus_needed, read_options, reserve_port
from demo.server import Server, serve_command
from demo.train.recitation import DENSE

LOG = """\
(APIServer pid=174) INFO 11-21 06:28:04 [compilation.py:336] Enabled custom fusions
(EngineCore pid=190) \x1b[36m(RayWorkerProc pid=96, ip=10.77.0.2)\x1b[0m OSError: libatb.so: cannot open shared object
(EngineCore pid=190) ERROR 11-21 06:29:24 [core.py:1366] OSError: libatb.so: cannot open shared object
(EngineCore pid=190) INFO 11-21 06:43:25 [executor.py:45] vllm-ray-ascend 0.1.0 ready: 2 nodes, 2 NPUs; \
rank 0 -> 10.77.36.1 NPU 0 (physical 4), rank 1 -> 10.77.36.2 NPU 0 (physical 0)
(APIServer pid=174) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """Return a server that is not running, but whose log is there."""
    stopped = Server.__new__(Server)
    stopped.log = tmp_path / "serve.log"
    stopped.log.write_text(LOG)
    return stopped


def test_defaults() -> None:
    options = read_options({})
    assert (options.model, options.port, options.npus, options.once) == (str(DENSE), 8000, 4, False)
    assert options.knows_text


@pytest.mark.parametrize(
    ("arguments", "npus"),
    [("", 4), ("-tp 1", 2), ("-tp 4 -pp 1", 4), ("--tensor_parallel_size=2 -dp 2", 8), ("-tp 8 -tp 1 --seed 0", 2)],
)
def test_npus_needed(arguments: str, npus: int) -> None:
    assert npus_needed(tuple(arguments.split())) == npus


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PORT": "http"}, "PORT=http is not a TCP port"),
        ({"PORT": "65536"}, "1 to 65535"),
        ({"SERVE_ARGS": "--seed '0"}, "cannot be split"),
        ({"SERVE_ARGS": "-tp two"}, "invalid int value"),
        ({"SERVE_ARGS": "-pp 0"}, "1 or more"),
        ({"SERVE_ARGS": "--port 9000"}, "PORT="),
        ({"MODEL": "/no/such/model"}, "does not exist"),
        ({"MODEL": "no-one/no-such-model"}, "does not exist"),
        ({"MODEL": "/"}, r"no config\.json"),
    ],
)
def test_what_cannot_work_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(DemoError, match=message):
        read_options(environ)


def test_later_arguments_win() -> None:
    command = serve_command(read_options({"SERVE_ARGS": "-tp 4"}), "127.0.0.1")
    assert command[:3] == ["vllm", "serve", str(DENSE)]
    assert command[-2:] == ["-tp", "4"]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with pytest.raises(DemoError, match=rf"port {other.getsockname()[1]} cannot be used"):
            reserve_port(other.getsockname()[1])


def test_the_cause_of_a_failure_comes_first(server: Server) -> None:
    causes = server._errors().splitlines()
    assert [cause.strip() for cause in causes[:2]] == [
        "OSError: libatb.so: cannot open shared object",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert str(server.log) in causes[2]


def test_placement(server: Server) -> None:
    assert server.placement() == [
        "rank 0: node 10.77.36.1, NPU 0 (physical 4)",
        "rank 1: node 10.77.36.2, NPU 0 (physical 0)",
    ]


def test_the_forwarder_carries_both_ways_and_notices_who_goes_away() -> None:
    with socket.socket() as target, socket.socket() as listener:
        for each in (target, listener):
            each.bind(("127.0.0.1", 0))
            each.listen()
        heard = []

        def answer() -> None:
            connection, _ = target.accept()
            with connection:
                heard.append(connection.recv(100))
                connection.sendall(b"answer")
                heard.append(connection.recv(100))

        far = threading.Thread(target=answer)
        far.start()
        with Forwarder(listener, target.getsockname()):
            with socket.create_connection(listener.getsockname(), timeout=10) as client:
                client.sendall(b"question")
                assert client.recv(100) == b"answer"
            far.join(10)
        assert heard == [b"question", b""]
