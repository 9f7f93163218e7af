"""Ports of HCCL on this host, so that engines and processes of one node cannot take each other's."""

from __future__ import annotations

from collections.abc import Mapping

FIRST = 61000  # Linux gives ports up to 60999 to outgoing connections; HCCL's own default, 60000, lies among them
WINDOW = 64  # ports a physical NPU
LAST = 65535

_RANGE, _NPU_RANGE, _BASE = "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"
_AUTO = "auto"  # the operating system chooses


def port_variables(physical: int, share: float, environ: Mapping[str, str], *, ranges: bool = True) -> dict[str, str]:
    """Port settings of HCCL for a process with ``share`` (1.0 or less) of NPU ``physical``; none if the user set any.

    A whole NPU has a window of ports to itself: processes of different NPUs of a node never meet. Processes that share
    an NPU, and NPUs for which no window is left (from number 70 on), have their ports chosen by the operating system.

    ``ranges=False`` is for Atlas A2 with fused communication operators (MC2), where CANN does not support ranges:
    CANN documentation, HCCL_HOST_SOCKET_PORT_RANGE, restrictions. There HCCL_IF_BASE_PORT moves all ports above those
    of outgoing connections. CANN adds the physical number to it, and takes it to be the same for all ranks.
    """
    if environ.get(_RANGE) or environ.get(_BASE):
        return {}
    if not ranges:
        return {_BASE: str(FIRST)}
    if share < 1:
        return {_RANGE: _AUTO} | ({} if environ.get(_NPU_RANGE) else {_NPU_RANGE: _AUTO})
    first = FIRST + physical * WINDOW
    last = first + WINDOW - 1
    return {_RANGE: f"{first}-{last}" if last <= LAST else _AUTO}
