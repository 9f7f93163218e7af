"""vllm-ascend's Mooncake connectors in Ray Serve LLM: ports and names that no other replica has.

Ray imports this module by its name, in replicas with such a connector.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ray
import ray.serve
from ray.llm._internal.serve.engines.vllm.kv_transfer.base import BaseConnectorBackend, DefaultPDProtocolMixin

from vllm_ray_ascend.errors import SettingError

_FIRST_PORTS: Mapping[str, int] = {"kv_producer": 36000, "kv_consumer": 38000}
"""Each worker listens at a port of its own from the first one on. Prefill and decode may be on one node. Mooncake
itself takes ports at random from 20000 on, 1000 for each NPU of a node, of which there are 16 at most."""


class MooncakeBackend(DefaultPDProtocolMixin, BaseConnectorBackend):  # type: ignore[misc]
    """Gives each replica its first port and its engine's name before the engine is made."""

    def setup(self) -> None:
        """Complete ``kv_transfer_config``, and let the engine advertise the address by which Ray knows this node.

        Raises SettingError where Mooncake would wait for a peer that never answers.
        """
        _check_given(self.kv_transfer_config)
        address = str(ray.util.get_node_ip_address())
        os.environ.setdefault("VLLM_HOST_IP", address)
        rank = ray.serve.get_replica_context().rank.rank
        offset = port_offset(rank, self.llm_config.engine_kwargs)
        self.kv_transfer_config.update(
            settings_of_replica(self.kv_transfer_config, address, offset, self._get_unique_suffix())
        )


def _check_given(given: Mapping[str, Any]) -> None:
    """Raise SettingError where a user's ``kv_transfer_config`` cannot work with vllm-ascend's connectors."""
    connector, role = given.get("kv_connector"), given.get("kv_role")
    if role not in _FIRST_PORTS:
        raise SettingError(
            "VRA-161",
            f"kv_role={role!r} in kv_transfer_config: {connector} either sends caches or receives them. Set "
            "kv_producer in prefill_config and kv_consumer in decode_config.",
        )
    sizes = given.get("kv_connector_extra_config") or {}
    if missing := [side for side in ("prefill", "decode") if not {"tp_size", "dp_size"} <= set(sizes.get(side) or ())]:
        raise SettingError(
            "VRA-162",
            f"kv_connector_extra_config={dict(sizes)} in kv_transfer_config: {connector} has to know the sizes of both "
            f"sides, and lacks those of {' and '.join(missing)}. Set, in prefill_config and in decode_config alike: "
            '{"prefill": {"dp_size": 1, "tp_size": 1}, "decode": {"dp_size": 1, "tp_size": 1}}, with your sizes.',
        )


def port_offset(rank: int, engine_kwargs: Mapping[str, Any]) -> int:
    """Return how many ports replicas before that with Serve's ``rank`` may take, wherever they are.

    Mooncake itself adds the ports of the data parallel ranks below, but only where these step together (MoE): there is
    room for that in either case.
    """
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    return rank * math.prod(int(engine_kwargs.get(size) or 1) for size in sizes)


def settings_of_replica(given: Mapping[str, Any], address: str, offset: int, suffix: str) -> dict[str, Any]:
    """Return ``kv_port`` and ``engine_id`` of a replica on the node with this address.

    ``offset`` is the number of ports that earlier replicas take. What the user has ``given`` is where both start.
    """
    port = int(given.get("kv_port") or _FIRST_PORTS[given["kv_role"]]) + offset
    return {"kv_port": port, "engine_id": f"{given.get('engine_id') or suffix}-{address}-{port}"}
