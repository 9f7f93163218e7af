"""Which data parallel ranks serve: how engine cores and their manager notify API servers of it.

vLLM's own notifications about engine cores take the same way: the result of a call that nobody made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

RANK_DOWN = "vllm_ray_ascend_rank_down"
RANK_UP = "vllm_ray_ascend_rank_up"
SIZE_CHANGED = "vllm_ray_ascend_size_changed"
_LINGER_MS = 1000
_WAVES_PER_S = 50
"""More than there can be: a wave has at least 32 steps. A scaling has waves in 32 bits: enough for 497 days."""


class RankStatus(msgspec.Struct, frozen=True):
    """A data parallel rank that stops serving, or serves again."""

    rank: int
    cause: str = ""
    requests_lost: bool = False
    """Whether its requests are lost; else its engine core ends them, or continues with them."""
    is_new: bool = False
    """Whether its engine core is a new one, to which a connection has to be made first."""


class SizeStatus(msgspec.Struct, frozen=True):
    """How many data parallel ranks an engine has from now on; those with higher numbers are gone."""

    ranks: int
    local_ranks: int
    """Those that vLLM counts as this node's."""
    redundant_experts: int


def notification(kind: str, status: RankStatus | SizeStatus) -> Any:
    """Return the EngineCoreOutputs that contain a status. ``kind`` is RANK_DOWN, RANK_UP or SIZE_CHANGED."""
    from vllm.v1.engine import EEP_NOTIFICATION_CALL_ID, EngineCoreOutputs, UtilityOutput
    from vllm.v1.serial_utils import UtilityResult

    result = UtilityResult([kind, msgspec.to_builtins(status)])
    rank = status.rank if isinstance(status, RankStatus) else 0
    return EngineCoreOutputs(
        engine_index=rank, utility_output=UtilityOutput(call_id=EEP_NOTIFICATION_CALL_ID, result=result)
    )


def error_output(request_id: str, is_pooling: bool) -> Any:
    """Return the EngineCoreOutput of a request that has failed.

    vLLM takes one without a pooling result for a generated text: of a pooling request it ends the API server.
    """
    import torch
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    result = torch.empty(0) if is_pooling else None
    return EngineCoreOutput(request_id, [], pooling_output=result, finish_reason=FinishReason.ERROR)


def notify_clients(engine: Any, kind: str, status: RankStatus) -> None:
    """Notify all API servers of an engine core from its own process."""
    for client in range(engine.client_count):
        engine.output_queue.put_nowait((client, notification(kind, status)))


class StatusPublisher:
    """Notifies all API servers from the manager's process, on the addresses at which they receive outputs."""

    def __init__(self, addresses: Any) -> None:
        """``addresses`` are vLLM's EngineZmqAddresses."""
        self._addresses = addresses
        self._lock = threading.Lock()
        self._sockets: dict[str, Any] = {}
        self._closed = False
        self._created_at = time.monotonic()

    def publish(self, kind: str, status: RankStatus | SizeStatus) -> None:
        """Notify all API servers. Does not wait for one that does not read."""
        for address in self._addresses.outputs:
            self._send(address, notification(kind, status))

    def reset_coordinator(self, rank: int) -> None:
        """Let the coordinator forget what a rank's engine core, which is gone, reported last: load and wave.

        A wave is a period in which the ranks of a mixture of experts step. New ones begin at 0 and take over any later
        number, so one that is later than all before is enough.
        """
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.metrics.stats import SchedulerStats

        if address := self._addresses.coordinator_output:
            wave = 1 + int((time.monotonic() - self._created_at) * _WAVES_PER_S)
            outputs = EngineCoreOutputs(engine_index=rank, scheduler_stats=SchedulerStats(), wave_complete=wave)
            self._send(address, outputs)

    def close(self) -> None:
        """Close the sockets, once what was sent has had a moment to leave."""
        with self._lock:
            self._closed = True
            for socket in self._sockets.values():
                socket.close()
            self._sockets.clear()

    def _send(self, address: str, outputs: Any) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        frames: Sequence[Any] = MsgpackEncoder().encode(outputs)
        with self._lock:
            if self._closed:  # nobody listens any more, and nobody would close a new socket
                return
            self._socket(address).send_multipart(frames)

    def _socket(self, address: str) -> Any:
        import zmq

        if address not in self._sockets:
            socket: Any = zmq.Context.instance().socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(address)
            self._sockets[address] = socket
        return self._sockets[address]
