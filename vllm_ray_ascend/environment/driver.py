"""The driver's own network settings, which every process of its engines gets in one internal variable."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, names_copied_on_request

NETWORK_SETTINGS: tuple[tuple[str, ...], ...] = (
    ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"),
    ("GLOO_SOCKET_IFNAME",),
    ("TP_SOCKET_IFNAME",),
    ("VLLM_HOST_IP",),
    ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"),
    ("HCCL_NPU_SOCKET_PORT_RANGE",),
)
"""Network settings of a node, in groups. In a group the first overrides the others, so all come from one source."""


class DriverSettings(msgspec.Struct, frozen=True):
    """Ray's address of the driver's node, the network settings there, and the names to copy to every node."""

    address: str
    variables: dict[str, str]
    everywhere: list[str] = []


def encode_driver_settings(address: str, environ: Mapping[str, str]) -> str:
    """Return the value of DRIVER_VARIABLE for processes that this one starts.

    Call it before `apply_network_settings` sets anything here. An engine actor starts workers in turn, with an
    environment that was partly derived: it passes on the value that it was given.
    """
    inherited = environ.get(DRIVER_VARIABLE)
    if inherited is not None and parse_driver_settings(inherited) is not None:
        return inherited
    variables = {name: environ[name] for group in NETWORK_SETTINGS for name in group if environ.get(name)}
    everywhere = sorted(names_copied_on_request(environ) & variables.keys())
    return msgspec.json.encode(DriverSettings(address, variables, everywhere)).decode()


def parse_driver_settings(text: str | None) -> DriverSettings | None:
    """Return what `encode_driver_settings` wrote; None for any other text, never an exception."""
    try:
        return msgspec.json.decode(text, type=DriverSettings) if text else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
