"""Ports of HCCL on this host, so that engines and processes of one node never compete for the same ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT = 61000
"""Linux gives ports up to 60999 to outgoing connections, unless configured otherwise. HCCL's own default is 60000."""
PORTS_PER_NPU = 64
LAST_PORT = 65535

_RANGE, _NPU_RANGE, _BASE = "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"
_AUTO = "auto"  # the operating system chooses


def first_port_of_hccl(outgoing: str, reserved: str = "") -> int:
    """Return the first port from 61000 on that no outgoing connection gets; beyond LAST_PORT where there is none.

    The texts are those of net.ipv4.ip_local_port_range and ip_local_reserved_ports, such as "32768 60999" and
    "61000-65535,8080"; what cannot be read counts as Linux's default.
    """
    numbers = outgoing.split()
    last = int(numbers[1]) if len(numbers) == 2 and all(map(str.isdecimal, numbers)) else FIRST_PORT - 1
    kept = [(int(first), int(end or first)) for first, end in re.findall(r"(\d+)(?:-(\d+))?", reserved)]
    taken = (port for port in range(min(last, LAST_PORT), FIRST_PORT - 1, -1) if not _is_in(port, kept))
    return max(FIRST_PORT, next(taken, FIRST_PORT - 1) + 1)


def _is_in(port: int, ranges: list[tuple[int, int]]) -> bool:
    return any(first <= port <= last for first, last in ranges)


def port_variables(
    physical_id: int, share: float, environ: Mapping[str, str], *, ranges: bool = True, first_port: int = FIRST_PORT
) -> dict[str, str]:
    """Return HCCL's port settings for a process with ``share`` (1.0 or less) of an NPU, except those the user has set.

    A whole NPU has a range of ports to itself: processes of different NPUs of a node never meet. Processes that share
    an NPU, and NPUs for which no range is left (from physical id 70), have their ports chosen by the operating system.
    ``first_port`` is that of this node's NPU 0, `first_port_of_hccl`.

    ``ranges=False`` is for Atlas A2 with fused communication operators (MC2), where CANN does not support ranges:
    CANN documentation, HCCL_HOST_SOCKET_PORT_RANGE, restrictions. There HCCL_IF_BASE_PORT moves all ports above those
    of outgoing connections, by Linux's default for these. CANN adds the physical id to it, and requires the same value
    on all ranks.
    """
    if environ.get(_RANGE) or environ.get(_BASE):
        return npu_port_variables(share, environ) if ranges else {}
    if not ranges:
        return {_BASE: str(FIRST_PORT)}
    if share < 1:
        return {_RANGE: _AUTO} | npu_port_variables(share, environ)
    first = first_port + physical_id * PORTS_PER_NPU
    last = first + PORTS_PER_NPU - 1
    return {_RANGE: f"{first}-{last}" if last <= LAST_PORT else _AUTO}


def npu_port_variables(share: float, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the setting of HCCL's port on the NPU for a process with ``share`` of it; none for 1.0, or if it is set.

    Processes that share an NPU all take port 16666 otherwise, and the second one fails.
    """
    return {} if share >= 1 or environ.get(_NPU_RANGE) else {_NPU_RANGE: _AUTO}
