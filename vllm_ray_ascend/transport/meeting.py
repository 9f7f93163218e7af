"""Where the ranks of a communicator that the user made find its root info: Ray's control store.

Ray tells each actor no more than its rank, and a root info serves once and for some seconds only, so rank 0 makes it
when a graph is compiled.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter

from vllm_ray_ascend.compat.ray_state import kept_values
from vllm_ray_ascend.errors import TransferLateError

_NAMESPACE = b"vllm_ray_ascend.transport"
_CONNECT_S = 120.0  # HCCL_CONNECT_TIMEOUT where it is unset
_PAUSE_S = 0.01

_graphs: Counter[str] = Counter()
"""How many graphs of this process each communicator has served: the same number in all its actors."""


class Meeting:
    """One meeting of all ranks of a communicator."""

    def __init__(self, key: str) -> None:
        _graphs[key] += 1
        self._key = f"{key}/{_graphs[key]}".encode()
        self._values = kept_values()

    @staticmethod
    def new_key() -> str:
        """A key for a new communicator."""
        return uuid.uuid4().hex

    def tell(self, root: bytes) -> None:
        """Called by rank 0, before it connects."""
        self._values._internal_kv_put(self._key, root, overwrite=True, namespace=_NAMESPACE)

    def hear(self) -> bytes:
        """Called by the others. Raises TransferLateError where rank 0 has not told within HCCL_CONNECT_TIMEOUT."""
        given = os.environ.get("HCCL_CONNECT_TIMEOUT", "")
        limit_s = float(given) if given.isdigit() else _CONNECT_S
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            root: bytes | None = self._values._internal_kv_get(self._key, namespace=_NAMESPACE)
            if root is not None:
                return root
            time.sleep(_PAUSE_S)
        raise TransferLateError(
            f"Rank 0 of an HCCL communicator has not begun to connect within {limit_s:g} s (HCCL_CONNECT_TIMEOUT). See "
            "its log; if it was restarted since an earlier graph, make a new HcclCommunicator."
        )

    def forget(self) -> None:
        """Called by rank 0, once all are connected."""
        self._values._internal_kv_del(self._key, namespace=_NAMESPACE)
