"""How the ranks of a communicator that the user created get its root info: through Ray's control store (GCS).

Ray gives each actor only its rank, and a root info serves once and for some seconds only, so rank 0 creates it when a
graph is compiled.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter

from vllm_ray_ascend.compat.ray_state import gcs_key_value_store
from vllm_ray_ascend.errors import TransferLateError
from vllm_ray_ascend.hccl.limits import connect_limit_s

_NAMESPACE = b"vllm_ray_ascend.ray_transport"
_POLL_S = 0.01

_graph_counts: Counter[str] = Counter()
"""How many graphs of this process each communicator has served: the same number in all its actors."""


class RootInfoStore:
    """Where rank 0 puts the root info of a communicator for one graph, and the other ranks find it."""

    def __init__(self, key: str) -> None:
        _graph_counts[key] += 1
        self._key = f"{key}/{_graph_counts[key]}".encode()
        self._values = gcs_key_value_store()

    @staticmethod
    def create_key() -> str:
        """Return a key for a new communicator."""
        return uuid.uuid4().hex

    def publish(self, root_info: bytes) -> None:
        """Store the root info. Called by rank 0, before it connects."""
        self._values._internal_kv_put(self._key, root_info, overwrite=True, namespace=_NAMESPACE)

    def wait(self) -> bytes:
        """Wait for the root info. Called by the other ranks.

        Raises TransferLateError where rank 0 has not published it within HCCL_CONNECT_TIMEOUT and 20 s.
        """
        limit_s = connect_limit_s(os.environ)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            root_info: bytes | None = self._values._internal_kv_get(self._key, namespace=_NAMESPACE)
            if root_info is not None:
                return root_info
            time.sleep(_POLL_S)
        raise TransferLateError(
            "VRA-525",
            f"Rank 0 of an HCCL communicator has not begun to connect within {limit_s:g} s (HCCL_CONNECT_TIMEOUT and "
            "20). See its log; if it was restarted since an earlier graph, create a new HcclCommunicator.",
        )

    def delete(self) -> None:
        """Delete the root info. Called by rank 0, once all ranks are connected."""
        self._values._internal_kv_del(self._key, namespace=_NAMESPACE)
