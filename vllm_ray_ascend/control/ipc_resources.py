"""Which names of shared memory and sockets a control server accepts from a process, to remove after its death. Pure.

It removes files with the rights of its own user: a name must have the form that Python and vLLM give to what they make
for a queue, so that no message of a peer can name any other file.
"""

from __future__ import annotations

import re

MAX_RESOURCES = 64
"""Names of one process. A worker has a segment and two sockets for its queue."""
_SEGMENT = re.compile(r"psm_[0-9a-f]{8}")
"""multiprocessing.shared_memory"""
_SOCKET = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""vllm.utils.network_utils.get_open_zmq_ipc_path: a UUID"""


def is_removable(name: str, socket_folder: str) -> bool:
    """Return whether ``name`` is a segment's, or the path of a socket of vLLM right in ``socket_folder``."""
    folder, slash, file = name.rpartition("/")
    if not slash:
        return _SEGMENT.fullmatch(name) is not None
    return bool(socket_folder) and folder == socket_folder.rstrip("/") and _SOCKET.fullmatch(file) is not None
