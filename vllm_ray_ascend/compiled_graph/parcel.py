"""What goes through the graph's host channels: bytes, which Ray copies as they are.

A channel between nodes cannot grow while the engine runs: Ray would ask a worker for a larger one, whose main thread
serves vLLM's calls. What is too large goes through Ray's object store instead.
"""

from __future__ import annotations

import pickle
from typing import Any

_OVERHEAD = 16384
"""Bytes that Ray adds to a message, and the next stage's names of its tensors, at most."""


def pack(value: Any, room: int) -> tuple[bytes, Any]:
    """``value`` as a message of at most ``room`` bytes, and what has to be kept until it was read."""
    message = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    if len(message) + _OVERHEAD <= room:
        return message, None
    import ray

    reference = ray.put(message)
    return pickle.dumps(reference, pickle.HIGHEST_PROTOCOL), reference


def unpack(message: bytes) -> Any:
    """What was packed."""
    import ray

    value = pickle.loads(message)
    return pickle.loads(ray.get(value)) if isinstance(value, ray.ObjectRef) else value
