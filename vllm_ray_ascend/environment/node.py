"""Derives this node's network settings and sets them in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence

from vllm_ray_ascend.environment.derive import Derived, Interface, derive
from vllm_ray_ascend.environment.driver import GROUPS, DriverSettings


def interfaces() -> list[Interface]:
    """Name and address of every network interface here, IPv4 and IPv6."""
    import psutil  # type: ignore[import-untyped]

    internet = (socket.AF_INET, socket.AF_INET6)
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in internet
    ]


def prepare(
    address: str,
    driver: DriverSettings | None = None,
    environ: MutableMapping[str, str] | None = None,
    groups: Sequence[tuple[str, ...]] = GROUPS,
) -> Derived:
    """Sets in ``environ`` (default: this process's) what it lacks of `derive`; what it set, and notes for the log.

    Call it before HCCL, gloo or vLLM's network functions are used, and before variables of the driver are applied.
    """
    environ = os.environ if environ is None else environ
    derived = derive(address, interfaces(), environ, driver, groups)
    environ.update(derived.variables)
    return derived
