"""Weights from a trainer to engines over the direct transport: a backend of vLLM's weight transfer API, `hccl_direct`.

The trainer announces where some of its tensors are, and each worker requests them over a link of its own. So no group
of trainer and workers is created in advance, whose size could not change: engines come and go while the trainer runs.
An update that fails leaves engines that take the next one, whose weights are some of before and some of the update.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ray
import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.hccl.limits import transfer_limit_s
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.ray_transport.direct import WEIGHTS_BACKEND
from vllm_ray_ascend.ray_transport.direct.local_endpoint import LocalEndpoint, get_local_endpoint
from vllm_ray_ascend.ray_transport.direct.receiver import Origin, Receiver
from vllm_ray_ascend.ray_transport.direct.sender import Sender

_log = get_logger("ray_ascend.direct")
_CHUNK_BYTES = 1 << 30

Weight = tuple[str, torch.Tensor]


@dataclass
class DirectInitInfo(WeightTransferInitInfo):
    """Nothing: a worker connects with its first update."""


@dataclass
class DirectUpdateInfo(WeightTransferUpdateInfo):
    """Some weights, which the trainer keeps as one object, or that it has given the update up, and why."""

    object_id: str = ""
    origin: list[Any] = field(default_factory=list)
    """Where: host, port and token of the trainer's process, and the visible index of the NPU there."""
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    """Of torch, as "bfloat16"."""
    shapes: list[list[int]] = field(default_factory=list)
    given_up: str = ""


@dataclass
class DirectTrainerInitInfo(TrainerInitInfo):
    """What a rank of the trainer is given. Rank 0 sends."""

    backend: ClassVar[str] = WEIGHTS_BACKEND

    chunk_bytes: int = _CHUNK_BYTES
    """Bytes of weights that are sent for one request to the engine: each worker holds so many beside its model's."""


class DirectWeightTransferEngine(WeightTransferEngine[DirectInitInfo, DirectUpdateInfo]):
    """The part of a worker, which is an actor of Ray."""

    init_info_cls = DirectInitInfo
    update_info_cls = DirectUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take upstream's arguments. Raises DirectTransportError where this worker is no actor of Ray."""
        super().__init__(*args, **kwargs)
        if not ray.is_initialized():
            raise DirectTransportError(
                "VRA-549",
                f"the weight transfer backend {WEIGHTS_BACKEND!r} needs workers that are actors of Ray, and this one "
                "is a plain process: start the engine with --distributed-executor-backend ray, or use the backend "
                "'hccl'.",
            )
        self._receiver = Receiver(_local_endpoint())

    def init_transfer_engine(self, init_info: DirectInitInfo) -> None:
        """Do nothing: a worker connects with its first update."""

    def start_weight_update(self) -> None:
        """Let the model take weights in the format of a checkpoint, layer by layer."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._restore_unfinished_layers()
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Complete the layers."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some weights, and load them. Raises DirectTransportError, after which the update is over."""
        try:
            super().update_weights(update_info)
        except BaseException:  # whatever it is: the worker takes the next update
            self._restore_unfinished_layers()
            raise

    def receive_weights(self, update_info: DirectUpdateInfo) -> None:
        """Receive some weights, and load them, as `update_weights` does."""
        self.model.load_weights(self._receive(update_info))

    def shutdown(self) -> None:
        """Destroy the communicators."""
        self._receiver.release()

    def _receive(self, update_info: DirectUpdateInfo) -> list[Weight]:
        if update_info.given_up:
            raise DirectTransportError(
                "VRA-552",
                f"the trainer has given up an update of this engine's weights ({update_info.given_up}): some are new, "
                "the others of before. Let it send them again.",
            )
        host, port, token, sender_device = update_info.origin
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]

        def allocate() -> list[torch.Tensor]:
            described = zip(update_info.shapes, dtypes, strict=True)
            return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in described]

        origin = Origin(Address(host, port, token), sender_device)
        tensors = self._receiver.receive_object(update_info.object_id, origin, self.device.index, allocate)
        return list(zip(update_info.names, tensors, strict=True))

    def _restore_unfinished_layers(self) -> None:
        """Give layers that have not all of their new weights those of before, which vLLM does for layers without any.

        It would add what the next update brings to what they have of this one.
        """
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.load_numel, info.loaded_weights = 0, []
        self.finish_weight_update()


class DirectTrainerWeightTransferEngine(TrainerWeightTransferEngine[DirectTrainerInitInfo]):
    """The trainer's part. All its ranks iterate over the weights, as FSDP gathers them; rank 0 sends."""

    init_info_cls = DirectTrainerInitInfo

    def __init__(self, *, chunk_bytes: int = _CHUNK_BYTES, **options: Any) -> None:
        """Take upstream's ``options``: client, source and is_sender."""
        super().__init__(**options)
        self._chunk_bytes = chunk_bytes

    @classmethod
    def trainer_init(
        cls, init_info: DirectTrainerInitInfo, *, client: Any, source: Any = None
    ) -> DirectTrainerWeightTransferEngine:
        """Return the trainer's part, ready to send the weights of ``source`` to the engines of ``client``.

        Raises DirectTransportError where there is no source, or rank 0 does not have all weights.
        """
        if source is None:
            raise DirectTransportError(
                "VRA-550",
                f"the weight transfer backend {WEIGHTS_BACKEND!r} needs the trainer's weights: "
                "trainer_init(..., source=vllm.distributed.weight_transfer.base.ModuleSource(model))",
            )
        if (held := source.held_names()) is not None:
            raise DirectTransportError(
                "VRA-551",
                f"{type(source).__name__}.held_names() names {len(held)} weights of this rank of the trainer, and with "
                f"{WEIGHTS_BACKEND!r} rank 0 sends all: let the source gather them there, and held_names() return "
                "None.",
            )
        if init_info.is_sender:
            client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender, chunk_bytes=init_info.chunk_bytes)

    def send_weights(self) -> None:
        """Send all weights to all engines. Raises DirectTransportError, and what an engine raises."""
        assert self.source is not None
        weights = iter(self.source)
        if self.is_sender:
            self._send_all(weights)
        _exhaust(weights)

    def shutdown(self) -> None:
        """Destroy the communicators."""
        if self.is_sender:
            _get_sender().release()

    def _send_all(self, weights: Iterator[Weight]) -> None:
        try:
            self._start_update()
            for chunk in split_into_chunks(weights, self._chunk_bytes):
                self._send(chunk)
                chunk.clear()  # before the next one is gathered
            self.client.finish_weight_update()
        except Exception as error:  # whatever it is, it is raised again
            self._give_up(f"{type(error).__name__}: {error}")
            _exhaust(weights)  # the other ranks gather them all
            raise

    def _start_update(self) -> None:
        """Start an update. An engine may be in one still, of a trainer that has died."""
        try:
            self.client.start_weight_update()
        except Exception as error:  # noqa: BLE001  whatever it is, the second attempt raises it
            self._give_up(f"the next one begins, after {type(error).__name__}: {error}")
            self.client.start_weight_update()

    def _send(self, weights: list[Weight]) -> None:
        """Have every worker receive some weights, all of one NPU."""
        sender, object_id = _get_sender(), uuid.uuid4().hex
        tensors = [tensor.detach() for _, tensor in weights]
        device = get_local_endpoint().common_device(tensors).index
        update_info = DirectUpdateInfo(
            object_id,
            [sender.address.host, sender.address.port, sender.address.token, device],
            [name for name, _ in weights],
            [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            [list(tensor.shape) for tensor in tensors],
        )
        sender.keep_object(object_id, tensors, device)
        try:
            self.client.update_weights(vars(update_info))
        finally:
            sender.drop_object(object_id)

    def _give_up(self, reason: str) -> None:
        """End the update in all engines, so that they take the next one. They answer with an error."""
        try:
            self.client.update_weights(vars(DirectUpdateInfo(given_up=reason)))
        except Exception as error:  # noqa: BLE001  of the engines, or that one of them is gone
            _log.debug("Engines have ended an update of their weights: %s", error)


def _exhaust(weights: Iterator[Weight]) -> None:
    for _ in weights:
        pass


@functools.cache
def _local_endpoint() -> LocalEndpoint:
    """Return this process, with the limit of a transfer: that of Ray is for Ray's own objects."""
    endpoint = get_local_endpoint()
    return dataclasses.replace(endpoint, limit_s=transfer_limit_s(endpoint.settings.transfer_limit_s, os.environ))


@functools.cache
def _get_sender() -> Sender:
    return Sender(_local_endpoint())


def split_into_chunks(weights: Iterable[Weight], most_bytes: int) -> Iterator[list[Weight]]:
    """Yield the weights in order, in lists of at most ``most_bytes`` or of one, each of one NPU.

    Each is made when it is asked for.
    """
    chunk: list[Weight] = []
    size = 0
    for name, tensor in weights:
        if chunk and (size + tensor.nbytes > most_bytes or tensor.device != chunk[-1][1].device):
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk
