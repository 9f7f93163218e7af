"""Connections whose two ends have proven to each other that they know a token, which is never sent.

For a client: `connect_authenticated`. For a server: `AuthenticatingListener`, which authenticates in a thread of its
own and hands out the connections, or `Handshake` for one that has an event loop. The handshake: the server sends a
nonce, the client answers with a nonce and its proof, the server with its own. A proof is the HMAC of both nonces, so
that none can be sent again. What follows is not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from threading import Thread

from vllm_ray_ascend.ipc.sockets import Address, bound_port, connect, listen, shut_down
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

NONCE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_LIMIT_S = 5.0
"""How long a client may take until it has proven the token."""
MAX_HANDSHAKES = 128
"""Handshakes at the same time; a further client takes the place of the one that has waited longest.

A server of many clients that may all connect simultaneously adds their number. So many may wait to be accepted, too."""
_TOKEN_BYTES = 16
_ATTEMPTS = 3
_ACCEPT_PAUSE_S = 0.1


def create_token() -> str:
    """Return a new token."""
    return secrets.token_hex(_TOKEN_BYTES)


class Handshake:
    """The server's side of one handshake. It never blocks: call `advance` whenever ``connection`` is readable."""

    def __init__(self, connection: socket.socket, token: str, limit_s: float = HANDSHAKE_LIMIT_S) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + limit_s
        self._token = token
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._received = b""
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a client that is gone already is noticed by `advance`
            connection.send(self._nonce)

    def advance(self) -> bool | None:
        """Read what has arrived, and no byte beyond the handshake.

        Return True once the client has proven the token: the connection is blocking then. Return False where it is
        gone, late or does not know the token: close the connection. Return None where it needs more time.
        """
        try:
            data = self.connection.recv(NONCE_BYTES + PROOF_BYTES - len(self._received))
        except BlockingIOError:
            return None if time.monotonic() < self.deadline else False
        except OSError:
            return False
        self._received += data
        if not data:
            return False
        if len(self._received) < NONCE_BYTES + PROOF_BYTES:
            return None if time.monotonic() < self.deadline else False
        return self._answer(self._received[:NONCE_BYTES], self._received[NONCE_BYTES:])

    def _answer(self, nonce: bytes, proof: bytes) -> bool:
        if not hmac.compare_digest(proof, _prove(self._token, b"client", self._nonce, nonce)):
            return False
        try:
            self.connection.send(_prove(self._token, b"server", nonce, self._nonce))
            self.connection.setblocking(True)
        except OSError:
            return False
        return True


def connect_authenticated(address: Address, limit_s: float = 30.0) -> socket.socket:
    """Return a blocking connection to a server that has proven to know the token of ``address``, as this end has.

    Raises OSError where that does not succeed within ``limit_s`` seconds, ConnectionError where the process that
    listens there does not know the token. A few attempts are made: the server may have given up on a process that the
    system let wait.
    """
    deadline = time.monotonic() + limit_s
    for attempt in range(_ATTEMPTS):
        connection = connect(address, max(0.01, deadline - time.monotonic()))
        try:
            _prove_to_server(connection, address.token, deadline)
            return connection
        except OSError as error:
            connection.close()
            if attempt == _ATTEMPTS - 1 or time.monotonic() >= deadline:
                raise ConnectionError(
                    f"VRA-590: {address} does not accept this process: {error}. Either the process that listens there "
                    "is not the one that gave the address, or it is too busy to answer."
                ) from error
    raise AssertionError("unreachable")


def _prove_to_server(connection: socket.socket, token: str, deadline: float) -> None:
    """Do the client's side of the handshake. Raises OSError."""
    theirs = _receive_exactly(connection, NONCE_BYTES, deadline)
    ours = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(ours + _prove(token, b"client", theirs, ours))
    proof = _receive_exactly(connection, PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _prove(token, b"server", ours, theirs)):
        raise ConnectionError("it does not know the token")
    connection.settimeout(None)


def _receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        received = connection.recv(size - len(data))
        if not received:
            raise ConnectionError("it closed the connection")
        data += received
    return data


def _prove(token: str, role: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(token.encode(), role + b"".join(nonces), "sha256")


def log_listener_error(error: Exception) -> None:
    """Log the error that has ended a listener."""
    logger.error("VRA-331: no further connection is accepted: %s: %s", type(error).__name__, error, exc_info=error)


class AuthenticatingListener:
    """Listens, and calls ``on_connection`` with each connection whose client has proven the token.

    It is called in the listener's thread, with a blocking socket, and must neither block nor raise. All clients are
    authenticated at the same time, each within ``limit_s`` seconds, so that one which sends nothing delays no other.
    """

    def __init__(
        self,
        host: str,
        on_connection: Callable[[socket.socket], None],
        *,
        limit_s: float = HANDSHAKE_LIMIT_S,
        max_handshakes: int = MAX_HANDSHAKES,
        on_error: Callable[[Exception], None] = log_listener_error,
        thread_name: str = "RayAscendListener",
        token: str | None = None,
    ) -> None:
        """Listen on ``host``. ``on_error`` is called, in the listener's thread, with an error that has ended it.

        ``token``: the one that clients know already; None for a new one.
        """
        self._socket = listen(host, max_handshakes)
        self._socket.setblocking(False)
        self._on_connection = on_connection
        self._on_error = on_error
        self._limit_s = limit_s
        self._max_handshakes = max_handshakes
        self._out_of_files = False
        self._handshakes: dict[socket.socket, Handshake] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._closed = False
        self.address = Address(host, bound_port(self._socket), token or create_token())
        Thread(target=self._run, daemon=True, name=thread_name).start()

    def close(self) -> None:
        """Accept no further connection. From any thread, `on_connection` included, any number of times."""
        self._closed = True
        shut_down(self._socket)  # wakes the thread, which closes the socket

    def _run(self) -> None:
        try:
            while not self._closed:
                for key, _ in self._selector.select(self._next_deadline_s()):
                    if key.fileobj is self._socket:
                        self._accept()
                    else:
                        self._advance(self._handshakes.get(key.fileobj))  # type: ignore[call-overload]
                self._end_late_handshakes()
        except Exception as error:  # noqa: BLE001  whatever it is, nobody would notice that no client is accepted
            self._on_error(error)
        finally:
            for handshake in list(self._handshakes.values()):
                self._end(handshake)
            self._selector.close()
            self._socket.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # a client that is gone already
        except OSError as error:
            if not self._closed:  # no more files, or no memory
                self._pause_accepting(error)
            return
        self._out_of_files = False
        if len(self._handshakes) >= self._max_handshakes:
            self._end_oldest_handshake()
        self._handshakes[connection] = Handshake(connection, self.address.token, self._limit_s)
        self._selector.register(connection, selectors.EVENT_READ)

    def _pause_accepting(self, error: OSError) -> None:
        if not self._out_of_files:
            logger.warning(
                "VRA-330: connections to %s wait, as this process cannot accept them: %s. Raise its limit of open "
                "files (`ulimit -n`), or see which connections are not closed.",
                self.address,
                error,
            )
        self._out_of_files = True
        self._end_oldest_handshake()
        time.sleep(_ACCEPT_PAUSE_S)

    def _advance(self, handshake: Handshake | None) -> None:
        result = handshake and handshake.advance()
        if handshake is None or result is None:
            return
        self._selector.unregister(handshake.connection)
        del self._handshakes[handshake.connection]
        if result:
            self._on_connection(handshake.connection)
        else:
            handshake.connection.close()

    def _end_late_handshakes(self) -> None:
        now = time.monotonic()
        for handshake in [each for each in self._handshakes.values() if each.deadline <= now]:
            self._end(handshake)

    def _end_oldest_handshake(self) -> None:
        if self._handshakes:
            self._end(next(iter(self._handshakes.values())))

    def _end(self, handshake: Handshake) -> None:
        self._selector.unregister(handshake.connection)
        del self._handshakes[handshake.connection]
        handshake.connection.close()

    def _next_deadline_s(self) -> float | None:
        """Return the seconds until the first handshake is late; None where there is none: deadlines are in order."""
        first = next(iter(self._handshakes.values()), None)
        return None if first is None else max(0.0, first.deadline - time.monotonic())
