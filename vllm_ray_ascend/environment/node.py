"""Derives this node's network settings and sets them in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from vllm_ray_ascend.environment.derive import DerivedSettings, Interface, derive_network_settings
from vllm_ray_ascend.environment.driver import NETWORK_SETTINGS, DriverSettings
from vllm_ray_ascend.environment.ports import first_port_of_hccl


def list_interfaces() -> list[Interface]:
    """Return name and address of every network interface here, IPv4 and IPv6."""
    import psutil  # type: ignore[import-untyped]

    internet = (socket.AF_INET, socket.AF_INET6)
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in internet
    ]


def read_first_port() -> int:
    """Return the first port for HCCL on this node."""
    return first_port_of_hccl(
        _read_kernel_setting("ip_local_port_range"), _read_kernel_setting("ip_local_reserved_ports")
    )


def _read_kernel_setting(name: str) -> str:
    try:
        return Path(f"/proc/sys/net/ipv4/{name}").read_text()
    except OSError:  # a container may hide it
        return ""


def apply_network_settings(
    address: str,
    driver: DriverSettings | None = None,
    environ: MutableMapping[str, str] | None = None,
    groups: Sequence[tuple[str, ...]] = NETWORK_SETTINGS,
) -> DerivedSettings:
    """Set the derived network settings that ``environ`` (default: this process's) lacks, and return them.

    Call it before HCCL, gloo or vLLM's network functions are used, and before variables of the driver are applied.
    """
    environ = os.environ if environ is None else environ
    derived = derive_network_settings(address, list_interfaces(), environ, driver, groups)
    environ.update(derived.variables)
    return derived
