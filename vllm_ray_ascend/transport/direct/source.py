"""The sending end: keeps the tensors of objects that live here, and sends them to whoever asks for them."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ray_ascend.lifecycle.messages import Address
from vllm_ray_ascend.lifecycle.sockets import listen
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.transport.direct.channel import Channel, ChannelLostError
from vllm_ray_ascend.transport.direct.messages import Coming, Failed, Hello, Refused, Want, Welcome
from vllm_ray_ascend.transport.direct.pair import SENDER, Connecting, Pair
from vllm_ray_ascend.transport.direct.place import Here
from vllm_ray_ascend.transport.hccl.group import new_root

if TYPE_CHECKING:
    import torch

_log = get_logger("ray_ascend.direct")
_SENDING = "sending tensors of a Ray object"
_TOKEN_BYTES = 16
_POLL_S = 0.0002


class _Kept(NamedTuple):
    """Tensors of one device, and the event after which they hold what their producer wrote."""

    tensors: list[torch.Tensor]
    device: int
    ready: Any


class Source:
    """Sends what was kept, each link in a thread of its own: no receiver waits for another's transfer."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._kept: dict[str, _Kept] = {}
        self._links: set[_Outgoing] = set()
        self._lock = threading.Lock()
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self._listener = listen(here.host)
        self.address = Address(here.host, self._listener.getsockname()[1], self._token)
        threading.Thread(target=self._accept, daemon=True, name="RayAscendDirectSource").start()

    def keep(self, object_id: str, tensors: Sequence[torch.Tensor], device: int) -> None:
        """Keep an object. Sends of it begin after what the calling thread's stream of ``device`` has been given."""
        npu = self._here.accelerator
        with npu.torch_module.device(device):
            ready = npu.new_event()
            ready.record()
        with self._lock:
            self._kept[object_id] = _Kept(list(tensors), device, ready)

    def drop(self, object_id: str) -> None:
        """Forget an object. A send of it that is under way goes on."""
        with self._lock:
            self._kept.pop(object_id, None)

    def find(self, object_id: str) -> _Kept | None:
        """An object that is kept."""
        with self._lock:
            return self._kept.get(object_id)

    def release(self) -> None:
        """Destroy all communicators; receivers that come back have new ones."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.give_up("the sender released its communicators")

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            link = _Outgoing(self, self._here, connection)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=self._run, args=(link,), daemon=True, name="RayAscendDirectSender").start()

    def _run(self, link: _Outgoing) -> None:
        try:
            link.run(self._token)
        finally:
            with self._lock:
                self._links.discard(link)


class _Outgoing:
    """The sending end of one link."""

    def __init__(self, source: Source, here: Here, connection: socket.socket) -> None:
        self._source = source
        self._here = here
        self._pair: Pair | None = None
        self._channel = Channel(connection, here.settings.silence_s, self._abort)
        self._receiver = "a receiver"

    def run(self, token: str) -> None:
        """Serve the receiver until it leaves, fails, or has been idle for long."""
        try:
            hello = self._channel.hear(self._here.limit_s)
            if isinstance(hello, Hello) and secrets.compare_digest(hello.token, token):
                self._open(hello)
                while True:
                    self._answer(self._channel.hear(self._here.settings.direct_idle_s or None))
        except TimeoutError:
            _log.debug("The direct transport's link to %s was idle, and is released.", self._receiver)
        except ChannelLostError as error:
            _log.debug("The direct transport's link to %s has ended: %s.", self._receiver, error)
        except Exception as error:  # noqa: BLE001  whatever it is, the receiver is told, and raises it
            _log.warning("The direct transport could not send to %s: %s", self._receiver, error)
            with contextlib.suppress(ChannelLostError):
                self._channel.say(Failed(f"{type(error).__name__}: {error}"))
        finally:
            self._channel.close()
            if self._pair is not None:
                self._pair.end("the link has ended")

    def give_up(self, why: str) -> None:
        """End the link. May be called in any thread."""
        with contextlib.suppress(ChannelLostError):
            self._channel.say(Failed(why))
        self._channel.close()

    def _open(self, hello: Hello) -> None:
        self._receiver = hello.who
        self._device = hello.device
        own = self._here.place(hello.device)
        if own == hello.place:
            self._channel.say(
                Refused(
                    f"sender and receiver are both on {own}, and HCCL connects two NPUs only. Give each actor an NPU "
                    'of its own (`@ray.remote(resources={"NPU": 1})`), or pass the object within one actor.'
                )
            )
            raise ChannelLostError("it is on the same NPU")
        root, limit_s = new_root(hello.device), self._here.limit_s
        self._channel.say(Welcome(root, self._here.who))
        self._pair = Connecting(hello.device, SENDER, root, limit_s).result(time.monotonic() + limit_s, self._check)

    def _answer(self, message: object) -> None:
        if not isinstance(message, Want):
            raise ChannelLostError("it asked for what is no object")
        kept = self._source.find(message.object_id)
        if kept is None or kept.device != self._device:
            self._channel.say(
                Refused(
                    f"{self._here.who} no longer has object {message.object_id[:16]}: it was freed, or belongs to an "
                    "earlier process of this actor. Keep its ObjectRef until the receiver has it, and produce it anew."
                )
            )
            return
        assert self._pair is not None
        while not self._ready(kept):  # the producer may compute for as long as it likes
            self._check()
            time.sleep(_POLL_S)
        with self._here.quiet(_SENDING, self._check):
            self._channel.say(Coming())
            transfer = self._pair.send(kept.tensors)
        transfer.wait(self._here.limit_s)

    def _ready(self, kept: _Kept) -> bool:
        with self._here.quiet(_SENDING, self._check):
            return bool(kept.ready.query())

    def _check(self) -> None:
        if self._channel.lost:
            raise ChannelLostError(self._channel.lost)

    def _abort(self, why: str) -> None:
        if self._pair is not None:
            self._pair.end(f"{self._receiver} is gone: {why}")
