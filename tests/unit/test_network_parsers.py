"""Every parser that reads from the network, given anything: it returns a message or none, and names no other file.

The handshake has such a test in test_authentication.py, the frames of message queues in test_message_parser.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.test_control import HELLO, LIMIT_S, Losses, wait_for
from vllm_ray_ascend.control import protocol as control
from vllm_ray_ascend.control.ipc_resources import is_removable
from vllm_ray_ascend.control.server import ControlServer
from vllm_ray_ascend.ipc.authentication import connect_authenticated
from vllm_ray_ascend.ipc.relay import RelayedReader, RelayWriter, plan_relays
from vllm_ray_ascend.ray_transport.direct import protocol as direct

pytestmark = pytest.mark.unit

PROTOCOLS = [control, direct]
TAGS = ["hello", "sentinel", "device_opened", "phase_started", "ipc_resource", "failed", "status", "command"]
TAGS += ["extension", "welcome", "fetch", "send_ready", "refused", "other"]
FIELDS = ["rank", "pid", "node", "physical", "device", "phase", "name", "text", "process", "npu", "root_info", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.builds(
    lambda tag, fields: json.dumps({"type": tag, **fields}).encode(),
    st.sampled_from(TAGS),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6),
)
LINES = (
    st.binary(max_size=200) | OBJECTS | st.builds(lambda a, b, cut: a[:cut] + b, OBJECTS, OBJECTS, st.integers(0, 99))
)
RANK_7 = struct.pack("!I", 7)
"""The first message of rank 7 to its node's relay."""
NESTED = b'{"type":"failed","x":' + b"[" * 3000
NO_UTF8 = b'{"type":"failed","text":"\xff"}'


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.__name__.rpartition(".")[2] or "direct")
@given(line=LINES)
@example(line=NESTED)
@example(line=NO_UTF8)
@settings(max_examples=500, deadline=None)
def test_a_line_is_a_message_or_none(protocol: object, line: bytes) -> None:
    message = protocol.decode_message(line)  # type: ignore[attr-defined]
    assert message is None or isinstance(message, msgspec.Struct)
    if message is not None:
        encoded = protocol.encode_message(message)  # type: ignore[attr-defined]
        assert encoded.count(b"\n") == 1 and protocol.decode_message(encoded) == message  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def server() -> Iterator[ControlServer]:
    server = ControlServer("127.0.0.1", 30.0, Losses(), socket_folder="/tmp")
    yield server
    server.close()


@given(st.lists(LINES | st.just(NESTED) | st.just(NO_UTF8), max_size=5), st.booleans(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_server_outlives_all_that_peers_send(
    server: ControlServer, lines: list[bytes], says_hello: bool, pieces: int
) -> None:
    errors: list[Exception] = []
    server._on_error = errors.append
    data = HELLO * says_hello + b"\n".join(lines)
    step = len(data) // pieces + 1
    with connect_authenticated(server.address, LIMIT_S) as peer, contextlib.suppress(OSError):  # it may be cut off
        for start in range(0, len(data), step):
            peer.sendall(data[start : start + step])
        peer.shutdown(socket.SHUT_WR)
        peer.settimeout(LIMIT_S)
        while peer.recv(4096):
            pass
    with connect_authenticated(server.address, LIMIT_S) as last:
        last.sendall(control.encode_message(control.Hello(77, os.getpid(), "10.0.0.9")))
        wait_for(lambda: 77 in server.connected_ranks())
    wait_for(lambda: 77 not in server.connected_ranks())
    assert errors == []


@given(st.binary(max_size=80).filter(lambda text: not text.startswith(RANK_7)))
@example(struct.pack("!I", 3))
@settings(max_examples=60, deadline=None)
def test_a_relay_takes_nobody_for_a_rank_that_does_not_say_so(hello: bytes) -> None:
    (relay,) = plan_relays([[0, 7]])
    writer, reader = RelayWriter(relay), RelayedReader(relay, 7)
    with connect_authenticated(relay.address, LIMIT_S) as other:
        other.send(hello)
        assert not writer.accept_readers(time.monotonic() + 0.01)
        assert not reader.poll(0)  # it connects
        assert writer.accept_readers(time.monotonic() + LIMIT_S)
    writer.send([b"a step"], LIMIT_S)
    assert reader.recv() == b"a step"
    writer.close()
    reader.close()


NAMES = st.sampled_from(
    ["psm_0123abcd", "psm_", "..", ".", "", "tmp", "etc", "passwd", str(uuid.UUID(int=5)), "\n", "\0"]
)


@given(st.lists(NAMES, max_size=4).map("/".join) | st.text(max_size=60), st.sampled_from(["/tmp", "/tmp/", "", "/a/b"]))
@settings(max_examples=1000, deadline=None)
def test_a_removable_name_is_a_segment_or_a_socket_right_in_its_folder(name: str, folder: str) -> None:
    if not is_removable(name, folder):
        return
    path = Path("/dev/shm") / name
    assert path == Path(os.path.normpath(path)) and "\n" not in name and "\0" not in name
    if path.parent == Path("/dev/shm"):
        assert path.name.startswith("psm_") and len(path.name) == 12
    else:
        assert folder and path.parent == Path(folder) and str(uuid.UUID(path.name)) == path.name


@pytest.mark.parametrize("name", ["psm_0123abcd", f"/tmp/{uuid.uuid4()}"], ids=["segment", "socket"])
def test_names_as_python_and_vllm_give_them_are_removable(name: str) -> None:
    assert is_removable(name, "/tmp")


@pytest.mark.parametrize("name", ["/tmp/x/{}", "/tmp/../etc/{}", "/tmpx/{}", "tmp/{}", "/{}", "//tmp/{}", "/tmp//{}"])
def test_sockets_elsewhere_are_not_removable(name: str) -> None:
    assert not is_removable(name.format(uuid.uuid4()), "/tmp")


def test_python_s_own_name_of_a_segment_is_removable() -> None:
    from multiprocessing.shared_memory import SharedMemory

    segment = SharedMemory(create=True, size=16)
    try:
        assert is_removable(segment.name, "")
    finally:
        segment.close()
        segment.unlink()
