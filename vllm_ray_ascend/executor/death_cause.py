"""What Ray knows of the death of a worker: that its memory monitor killed it, or that Ray's head is gone."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

from vllm_ray_ascend.addresses import split_host_port

_CONNECT_S = 1.0
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RECONNECT_S = 60.0
"""Ray's default of it, 2.48 to 2.60."""
_DETAILS = re.compile(r"[.;]? (?:Object store memory usage:|[Tt]o see |Refer to )")
"""What follows in Ray's report after figures and threshold, in 2.48 to 2.60."""


def ray_failure(reference: Any, limit_s: float = 0.0) -> str:
    """Return why the call of an actor that ``reference`` is of has ended, waiting ``limit_s`` seconds for that.

    Empty where Ray does not know more than that the actor's process has died, and where the call has not ended.
    """
    import ray

    if not ray.is_initialized():  # as when the interpreter exits: ray.wait would start or join a cluster
        return ""
    done, _ = ray.wait([reference], timeout=limit_s)
    try:
        if done:
            ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.OutOfMemoryError as error:
        return memory_monitor_message(str(error))
    except ray.exceptions.RayError:
        pass
    return ""


def memory_monitor_message(ray_text: str) -> str:
    """Return the first sentences of Ray's report about a process that its memory monitor killed, with what to do."""
    first = _DETAILS.split(" ".join(ray_text.split()))[0].rstrip(".;")
    return (
        f"Ray's memory monitor killed it: {first}. Give the node more memory, start fewer processes there, or set "
        "RAY_memory_usage_threshold, or RAY_memory_monitor_refresh_ms=0 (off), where `ray start` runs."
    )


def gcs_obstacle(address: str) -> str | None:
    """Return why Ray's head (GCS) at HOST:PORT cannot be reached; None where it listens."""
    host, port = split_host_port(address)
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def reconnect_limit_s(environ: Mapping[str, str]) -> float:
    """Return after how many seconds without a head Ray ends a process that has these variables."""
    try:
        return float(environ.get(_RECONNECT, _RECONNECT_S))
    except ValueError:
        return _RECONNECT_S


def head_lost_message(address: str, obstacle: str, limit_s: float, loss: str) -> str:
    """Return the text for a ``loss`` that follows from that of Ray's head."""
    return (
        f"Ray's head (GCS) at {address} is gone ({obstacle}): Ray ends all processes of its cluster {limit_s:.0f} s "
        f"later ({_RECONNECT}). Start Ray again on all nodes, then the engine; a head with durable storage (Redis, "
        f"RocksDB) may come back within that time (Ray's GCS fault tolerance). {loss}"
    )


def head_silent_message(address: str, obstacle: str, limit_s: float) -> str:
    """Return the text for a head that is gone while the engine still serves."""
    return (
        f"Ray's head (GCS) at {address} does not answer ({obstacle}). Requests are served on, until Ray ends all "
        f"processes of this engine, {limit_s:.0f} s after the loss ({_RECONNECT}). Start the head again within that "
        "time if its storage is durable (Redis, RocksDB: Ray's GCS fault tolerance), else all of the cluster, then "
        "the engine."
    )


def head_gone_message(address: str, obstacle: str, gone_s: float, limit_s: float) -> str:
    """Return the text for an engine that ends, in order, before Ray ends its processes."""
    return (
        f"the engine ends because Ray's head (GCS) at {address} has been gone for {gone_s:.0f} s ({obstacle}): Ray "
        f"ends all processes {limit_s:.0f} s after the loss ({_RECONNECT}). Start Ray again on all nodes, then the "
        "engine; set the variable higher for `ray start` and for the engine where the head needs longer to come back."
    )
