"""Weights from a trainer to engines over the direct transport: a backend of vLLM's weight transfer API, `hccl_direct`.

The trainer announces where some of its tensors are, and each worker requests them over a link of its own. So no group
of trainer and workers is created in advance, whose size could not change: engines come and go while the trainer runs.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ray_transport.direct import WEIGHTS_BACKEND
from vllm_ray_ascend.ray_transport.direct.local_endpoint import get_local_endpoint
from vllm_ray_ascend.ray_transport.direct.receiver import Origin, Receiver
from vllm_ray_ascend.ray_transport.direct.sender import Sender

_CHUNK_BYTES = 1 << 30

Weight = tuple[str, torch.Tensor]


@dataclass
class DirectInitInfo(WeightTransferInitInfo):
    """Nothing: a worker connects with its first update."""


@dataclass
class DirectUpdateInfo(WeightTransferUpdateInfo):
    """Some weights, which the trainer keeps as one object."""

    object_id: str
    origin: list[Any]
    """Where: host, port and token of the trainer's process, and the visible index of the NPU there."""
    names: list[str]
    dtype_names: list[str]
    """Of torch, as "bfloat16"."""
    shapes: list[list[int]]


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
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: DirectInitInfo) -> None:
        """Check that this worker can receive. Raises DirectTransportError where it is no actor of Ray."""
        if not ray.is_initialized():
            raise DirectTransportError(
                "VRA-549",
                f"the weight transfer backend {WEIGHTS_BACKEND!r} needs workers that are actors of Ray, and this one "
                "is a plain process: start the engine with --distributed-executor-backend ray, or use the backend "
                "'hccl'.",
            )
        self._receiver = self._receiver or Receiver(get_local_endpoint())

    def start_weight_update(self) -> None:
        """Let the model take weights in the format of a checkpoint, layer by layer."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Complete the layers."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: DirectUpdateInfo) -> None:
        """Receive some weights, and load them. Raises DirectTransportError."""
        self.init_transfer_engine(DirectInitInfo())
        assert self._receiver is not None
        host, port, token, sender_device = update_info.origin
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]

        def allocate() -> list[torch.Tensor]:
            described = zip(update_info.shapes, dtypes, strict=True)
            return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in described]

        origin = Origin(Address(host, port, token), sender_device)
        tensors = self._receiver.receive_object(update_info.object_id, origin, self.device.index, allocate)
        self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

    def shutdown(self) -> None:
        """Destroy the communicators."""
        if self._receiver is not None:
            self._receiver.release()


class DirectTrainerWeightTransferEngine(TrainerWeightTransferEngine[DirectTrainerInitInfo]):
    """The trainer's part. All its ranks iterate over the weights, as FSDP gathers them; rank 0 sends."""

    init_info_cls = DirectTrainerInitInfo

    def __init__(self, *, chunk_bytes: int = _CHUNK_BYTES, **options: Any) -> None:
        """Take upstream's ``options``: client, source and is_sender."""
        super().__init__(**options)
        self._chunk_bytes = chunk_bytes
        self._sender = Sender(get_local_endpoint()) if self.is_sender else None

    @classmethod
    def trainer_init(
        cls, init_info: DirectTrainerInitInfo, *, client: Any, source: Any = None
    ) -> DirectTrainerWeightTransferEngine:
        """Return the trainer's part, ready to send the weights of ``source`` to the engines of ``client``.

        Raises DirectTransportError where there is no source, or the workers are no actors of Ray.
        """
        if source is None:
            raise DirectTransportError(
                "VRA-550",
                f"the weight transfer backend {WEIGHTS_BACKEND!r} needs the trainer's weights: "
                "trainer_init(..., source=vllm.distributed.weight_transfer.base.ModuleSource(model))",
            )
        if init_info.is_sender:
            client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender, chunk_bytes=init_info.chunk_bytes)

    def send_weights(self) -> None:
        """Send all weights to all engines. Raises DirectTransportError, and what an engine raises."""
        assert self.source is not None
        if self.is_sender:
            self.client.start_weight_update()
        for weights in split_into_chunks(self.source, self._chunk_bytes):
            if self.is_sender:
                self._send(weights)
        if self.is_sender:
            self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Destroy the communicators, and take no further request."""
        if self._sender is not None:
            self._sender.close()

    def _send(self, weights: list[Weight]) -> None:
        """Have every worker receive some weights."""
        assert self._sender is not None
        tensors = [tensor.detach() for _, tensor in weights]
        address, object_id = self._sender.address, uuid.uuid4().hex
        device = get_local_endpoint().common_device(tensors).index
        update_info = DirectUpdateInfo(
            object_id,
            [address.host, address.port, address.token, device],
            [name for name, _ in weights],
            [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            [list(tensor.shape) for tensor in tensors],
        )
        self._sender.keep_object(object_id, tensors, device)
        try:
            self.client.update_weights(vars(update_info))
        finally:
            self._sender.drop_object(object_id)


def split_into_chunks(weights: Iterable[Weight], most_bytes: int) -> Iterator[list[Weight]]:
    """Yield the weights in order, in lists of at most ``most_bytes`` or of one; each is made when it is asked for."""
    chunk: list[Weight] = []
    size = 0
    for name, tensor in weights:
        if chunk and size + tensor.nbytes > most_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk
