"""The sending end: keeps the tensors of objects of this process, and sends them to the processes that request them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ray_ascend.hccl.communicator import create_root_info
from vllm_ray_ascend.ipc.authentication import AuthenticatingListener
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.ray_transport.direct.connection import Connection, ConnectionLostError
from vllm_ray_ascend.ray_transport.direct.local_endpoint import LocalEndpoint
from vllm_ray_ascend.ray_transport.direct.pair_communicator import SENDER, PairCommunicator, PairConnector
from vllm_ray_ascend.ray_transport.direct.protocol import Failed, FetchRequest, Hello, Refused, SendReady, Welcome

if TYPE_CHECKING:
    import torch

_log = get_logger("ray_ascend.direct")
_SENDING = "sending the tensors of an object"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0001, 0.005


class _KeptObject(NamedTuple):
    """Tensors of one device, and the event after which they hold what their producer wrote."""

    tensors: list[torch.Tensor]
    device: int
    ready: Any


class Sender:
    """Sends the objects that it keeps, each link in a thread of its own: no receiver waits for another's transfer."""

    def __init__(self, local_endpoint: LocalEndpoint) -> None:
        self._endpoint = local_endpoint
        self._objects: dict[str, _KeptObject] = {}
        self._links: set[_SenderLink] = set()
        self._lock = threading.Lock()
        self._listener = AuthenticatingListener(
            local_endpoint.host, self._start_link, thread_name="RayAscendDirectAccept"
        )
        self.address = self._listener.address

    def keep_object(self, object_id: str, tensors: Sequence[torch.Tensor], device: int) -> None:
        """Keep an object. It is sent after what the calling thread's stream of ``device`` has queued up to now."""
        npu = self._endpoint.accelerator
        with npu.torch_module.device(device):
            ready = npu.create_event()
            ready.record()
        with self._lock:
            self._objects[object_id] = _KeptObject(list(tensors), device, ready)

    def drop_object(self, object_id: str) -> None:
        """Drop an object. A transfer of it that has started continues."""
        with self._lock:
            self._objects.pop(object_id, None)

    def find_object(self, object_id: str) -> _KeptObject | None:
        """Return a kept object; None where it was dropped or is of another process."""
        with self._lock:
            return self._objects.get(object_id)

    def release(self) -> None:
        """Destroy all communicators; later requests create new ones."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close_link("the sender released its communicators")

    def _start_link(self, connection: socket.socket) -> None:
        """Serve a receiver that has proven that it knows the token."""
        try:
            link = _SenderLink(self, self._endpoint, connection)
        except OSError:  # it has been reset already
            connection.close()
            return
        with self._lock:
            self._links.add(link)
        threading.Thread(target=self._serve_link, args=(link,), daemon=True, name="RayAscendDirectSender").start()

    def _serve_link(self, link: _SenderLink) -> None:
        try:
            link.serve_receiver()
        finally:
            with self._lock:
                self._links.discard(link)


class _SenderLink:
    """The sending end of one link."""

    def __init__(self, sender: Sender, local_endpoint: LocalEndpoint, connection: socket.socket) -> None:
        self._sender = sender
        self._endpoint = local_endpoint
        self._pair: PairCommunicator | None = None
        self._connection = Connection(connection, local_endpoint.settings.silence_s, self._on_lost)
        self._receiver = "a receiver"

    def serve_receiver(self) -> None:
        """Serve the receiver until it leaves, fails, or has been idle for direct_idle_s seconds."""
        try:
            hello = self._connection.wait(self._endpoint.limit_s)
            if isinstance(hello, Hello):
                self._connect_pair(hello)
                while True:
                    self._handle_request(self._connection.wait(self._endpoint.settings.direct_idle_s or None))
        except TimeoutError:
            _log.debug("The direct transport's link to %s was idle, and is released.", self._receiver)
        except ConnectionLostError as error:
            _log.debug("The direct transport's link to %s has ended: %s.", self._receiver, error)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported to the receiver, which raises it
            _log.warning("VRA-540: The direct transport could not send to %s: %s", self._receiver, error)
            with contextlib.suppress(ConnectionLostError):
                self._connection.send(Failed(f"{type(error).__name__}: {error}"))
        finally:
            self._connection.close()
            if self._pair is not None:
                self._pair.abort("the link has ended")

    def close_link(self, reason: str) -> None:
        """Close the link, from any thread."""
        with contextlib.suppress(ConnectionLostError):
            self._connection.send(Failed(reason))
        self._connection.close()

    def _connect_pair(self, hello: Hello) -> None:
        self._receiver = hello.process
        self._device = hello.device
        own_npu = self._endpoint.describe_npu(hello.device)
        if own_npu == hello.npu:
            self._connection.send(
                Refused(
                    f"VRA-541: sender and receiver are both on {own_npu}, and HCCL connects different NPUs only. Give "
                    'each actor an NPU of its own (`@ray.remote(resources={"NPU": 1})`), or pass the object within '
                    "one actor."
                )
            )
            raise ConnectionLostError("it is on the same NPU")
        root_info, limit_s = create_root_info(hello.device), self._endpoint.limit_s
        self._connection.send(Welcome(root_info, self._endpoint.process))
        connector = PairConnector(hello.device, SENDER, root_info, limit_s)
        self._pair = connector.wait_connected(time.monotonic() + limit_s, self._raise_if_lost)

    def _handle_request(self, message: object) -> None:
        if not isinstance(message, FetchRequest):
            raise ConnectionLostError("it sent a message that is not a request")
        kept = self._sender.find_object(message.object_id)
        if kept is None or kept.device != self._device:
            self._connection.send(
                Refused(
                    f"VRA-542: {self._endpoint.process} no longer has object {message.object_id[:16]}: it was freed, "
                    "or belongs to an earlier process of this actor. Keep its ObjectRef until the receiver has it, "
                    "and produce it again."
                )
            )
            return
        assert self._pair is not None
        pause_s = _SHORTEST_PAUSE_S
        while not self._is_computed(kept):  # the producer may compute for any time
            self._raise_if_lost()
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
        with self._endpoint.outside_captures(_SENDING, self._raise_if_lost):
            self._connection.send(SendReady())
            transfer = self._pair.send(kept.tensors)
        transfer.wait(self._endpoint.limit_s)

    def _is_computed(self, kept: _KeptObject) -> bool:
        with self._endpoint.outside_captures(_SENDING, self._raise_if_lost):
            return bool(kept.ready.query())

    def _raise_if_lost(self) -> None:
        if self._connection.lost_reason:
            raise ConnectionLostError(self._connection.lost_reason)

    def _on_lost(self, reason: str) -> None:
        if self._pair is not None:
            self._pair.abort(f"{self._receiver} is gone: {reason}")
