"""Network settings of a node, derived from the address that Ray has for it. Pure: see node.py for the effects."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vllm_ray_ascend.environment.driver import GROUPS, DriverSettings

Interface = tuple[str, str]  # name and address, which may carry a %scope

_INTERFACES = ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


class Derived(NamedTuple):
    """Variables to set, and what is worth a line in the log."""

    variables: dict[str, str]
    notes: list[str]


def derive(
    address: str,
    interfaces: Iterable[Interface],
    environ: Mapping[str, str],
    driver: DriverSettings | None = None,
    groups: Iterable[tuple[str, ...]] = GROUPS,
) -> Derived:
    """Network settings, of ``groups``, that ``environ`` lacks, for a process on the node that Ray knows by ``address``.

    What is set in ``environ`` stays as it is; an empty value counts as unset. Then come the driver's own settings, if
    this is its node, or for those that the user wants copied to every node. The rest comes from the interface that
    carries ``address``; where none does, nothing is derived, for HCCL, gloo and vLLM listen on the address they are
    given.
    """
    listed = list(interfaces)
    interface = carrier(address, listed)
    fitting = _fitting(address, interface) if interface else {}
    valid = _valid_here(address, driver)
    unset = [group for group in groups if not any(environ.get(name) for name in group)]
    variables: dict[str, str] = {}
    for group in unset:
        given = {name: valid[name] for name in group if name in valid}
        variables |= given or {name: fitting[name] for name in group if name in fitting}
    names = {name for group in unset for name in group}
    notes = [] if interface else _no_interface(address, listed, names - variables.keys())
    if driver:
        notes += _driver_only(address, interface, names & driver.variables.keys() - valid.keys(), driver)
    return Derived(variables, notes)


def carrier(address: str, interfaces: Iterable[Interface]) -> str | None:
    """Name of the interface that carries ``address``, or None. Any loopback address is the loopback interface's."""
    wanted = _plain(address)
    listed = [(name, _plain(carried)) for name, carried in interfaces]
    exact = next((name for name, carried in listed if carried == wanted), None)
    if exact is None and _is_loopback(wanted):
        return next((name for name, carried in listed if _is_loopback(carried)), None)
    return exact


def _fitting(address: str, interface: str) -> dict[str, str]:
    return {"HCCL_IF_IP": address, "VLLM_HOST_IP": address} | dict.fromkeys(_INTERFACES, interface)


def _valid_here(address: str, driver: DriverSettings | None) -> dict[str, str]:
    """The driver's settings that hold on the node at ``address``."""
    if driver is None:
        return {}
    here = _plain(driver.address) == _plain(address)
    return {name: value for name, value in driver.variables.items() if here or name in driver.everywhere}


def _no_interface(address: str, interfaces: list[Interface], unset: set[str]) -> list[str]:
    lacking = [name for name in _INTERFACES if name in unset]
    if not lacking:
        return []
    carried = ", ".join(f"{name} {each}" for name, each in interfaces) or "none"
    note = (
        f"No interface of this node has the address {address} by which Ray knows it (interfaces: {carried}), as behind "
        f"NAT or a container's port mapping, so {', '.join(lacking)} cannot be derived from it. Set them before "
        "`ray start` on this node; `ip -brief address` lists its interfaces."
    )
    return [note]


def _driver_only(address: str, interface: str | None, names: Iterable[str], driver: DriverSettings) -> list[str]:
    """Notes on the driver's choices that this node does not share, and that make a difference here."""
    notes = []
    for name in sorted(names):
        value = driver.variables[name]
        if name in _INTERFACES and not (interface and _selects(name, value, interface)):
            use = f"{interface}, which carries its address {address} in Ray" if interface else "not set"
            copy = f", or VLLM_RAY_EXTRA_ENV_VARS_TO_COPY={name} on the driver"
        elif name == "HCCL_IF_IP" and _plain(value) != _plain(driver.address):
            use, copy = address if interface else "not set", ""
        else:
            continue
        notes.append(
            f"{name}={value} was set on the driver's node {driver.address} only; on node {address} it is {use}. "
            f"If that is the wrong network, set {name} before `ray start` on this node{copy}."
        )
    return notes


def _selects(name: str, setting: str, interface: str) -> bool:
    """Whether ``setting`` chooses ``interface``. HCCL takes prefixes, after "=" whole names, after "^" all others."""
    if name != "HCCL_SOCKET_IFNAME":
        return interface in setting.split(",")
    inverted, setting = setting.startswith("^"), setting.removeprefix("^")
    whole, setting = setting.startswith("="), setting.removeprefix("=")
    listed = [entry for entry in setting.split(",") if entry]
    return any(interface == entry if whole else interface.startswith(entry) for entry in listed) != inverted


_Plain = ipaddress.IPv4Address | ipaddress.IPv6Address | str


def _plain(address: str) -> _Plain:
    """The address for comparisons: without its scope, and without regard to how it is written."""
    text = address.partition("%")[0]
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return text
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _is_loopback(address: _Plain) -> bool:
    return not isinstance(address, str) and address.is_loopback
