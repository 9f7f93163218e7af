"""vllm-ascend's Mooncake connectors in Ray Serve LLM: ports and names that no other replica has.

Ray imports this module by its name, in replicas with such a connector.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.llm._internal.serve.engines.vllm.kv_transfer.base import BaseConnectorBackend, DefaultPDProtocolMixin

_FIRST_PORTS: Mapping[str, int] = {"kv_consumer": 31000}
_FIRST_PORT = 30000
"""Each worker listens at a port of its own from the first one on. Prefill and decode may be on one node."""


class MooncakeBackend(DefaultPDProtocolMixin, BaseConnectorBackend):  # type: ignore[misc]
    """Gives each replica its first port and its engine's name before the engine is made."""

    def setup(self) -> None:
        """Complete ``kv_transfer_config``, and let the engine advertise the address by which Ray knows this node."""
        address = str(ray.util.get_node_ip_address())
        os.environ.setdefault("VLLM_HOST_IP", address)
        is_rank = self.llm_config.engine_kwargs.get("data_parallel_rank") is not None
        offset = 0 if is_rank else self._compute_port_offset()  # Mooncake itself adds that of data parallel ranks
        self.kv_transfer_config.update(
            settings_of_replica(self.kv_transfer_config, address, offset, self._get_unique_suffix())
        )


def settings_of_replica(given: Mapping[str, Any], address: str, offset: int, suffix: str) -> dict[str, Any]:
    """Return ``kv_port`` and ``engine_id`` of a replica on the node with this address.

    ``offset`` is the number of ports that earlier replicas take. What the user has ``given`` is where both start.
    """
    port = int(given.get("kv_port") or _FIRST_PORTS.get(given.get("kv_role", ""), _FIRST_PORT)) + offset
    return {"kv_port": port, "engine_id": f"{given.get('engine_id') or suffix}-{address}-{port}"}
