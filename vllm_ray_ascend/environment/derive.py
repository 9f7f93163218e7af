"""Network settings of a node, derived from the address that Ray has for it. Pure: see node.py for the effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vllm_ray_ascend.addresses import canonical, is_loopback, is_same, without_brackets
from vllm_ray_ascend.environment.driver import NETWORK_SETTINGS, DriverSettings

Interface = tuple[str, str]  # name and address, which may carry a %scope

_INTERFACE_SETTINGS = ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


class DerivedSettings(NamedTuple):
    """Variables to set, and warnings for the log, each with its code."""

    variables: dict[str, str]
    warnings: list[str]


def derive_network_settings(
    address: str,
    interfaces: Iterable[Interface],
    environ: Mapping[str, str],
    driver: DriverSettings | None = None,
    groups: Iterable[tuple[str, ...]] = NETWORK_SETTINGS,
) -> DerivedSettings:
    """Return the settings of ``groups`` that ``environ`` lacks, for a process on the node that Ray has at ``address``.

    What is set in ``environ`` stays as it is; an empty value counts as unset. Then come the driver's own settings, if
    this is its node, or for those that the user wants copied to every node. The rest comes from the interface that
    carries ``address``; where none does, nothing is derived, because HCCL, gloo and vLLM listen on the address they are
    given.
    """
    address = without_brackets(address)
    listed = list(interfaces)
    interface = interface_with_address(address, listed)
    derived = _settings_for_interface(address, interface) if interface else {}
    from_driver = _driver_settings_valid_here(address, driver)
    unset = [group for group in groups if not any(environ.get(name) for name in group)]
    variables: dict[str, str] = {}
    for group in unset:
        given = {name: from_driver[name] for name in group if name in from_driver}
        variables |= given or {name: derived[name] for name in group if name in derived}
    names = {name for group in unset for name in group}
    warnings = [] if interface else _no_interface_warning(address, listed, names - variables.keys())
    if driver:
        not_shared = names & driver.variables.keys() - from_driver.keys()
        warnings += _driver_only_warnings(address, interface, not_shared, driver)
    return DerivedSettings(variables, warnings)


def interface_with_address(address: str, interfaces: Iterable[Interface]) -> str | None:
    """Return the name of the interface with ``address``, or None. The loopback interface has any loopback address."""
    listed = [(name, canonical(carried)) for name, carried in interfaces]
    exact = next((name for name, carried in listed if carried == canonical(address)), None)
    if exact is None and is_loopback(address):
        return next((name for name, carried in listed if is_loopback(carried)), None)
    return exact


def _settings_for_interface(address: str, interface: str) -> dict[str, str]:
    return {"HCCL_IF_IP": address, "VLLM_HOST_IP": address} | dict.fromkeys(_INTERFACE_SETTINGS, interface)


def _driver_settings_valid_here(address: str, driver: DriverSettings | None) -> dict[str, str]:
    """Return the driver's settings that apply on the node at ``address``."""
    if driver is None:
        return {}
    same_node = is_same(driver.address, address)
    return {name: value for name, value in driver.variables.items() if same_node or name in driver.everywhere}


def _no_interface_warning(address: str, interfaces: list[Interface], unset: set[str]) -> list[str]:
    missing = [name for name in _INTERFACE_SETTINGS if name in unset]
    if not missing:
        return []
    listed = ", ".join(f"{name} {each}" for name, each in interfaces) or "none"
    warning = (
        f"VRA-256: No interface of this node has the address {address} by which Ray knows it (interfaces: {listed}), "
        f"as behind NAT or a container's port mapping, so {', '.join(missing)} cannot be derived from it. Set them "
        "before `ray start` on this node; `ip -brief address` lists its interfaces."
    )
    return [warning]


def _driver_only_warnings(
    address: str, interface: str | None, names: Iterable[str], driver: DriverSettings
) -> list[str]:
    """Return warnings of the driver's settings that this node does not share, and that make a difference here."""
    warnings = []
    for name in sorted(names):
        value = driver.variables[name]
        if name in _INTERFACE_SETTINGS and not (interface and selects_interface(name, value, interface)):
            value_here = f"{interface}, which carries its address {address} in Ray" if interface else "not set"
            copy = f", or VLLM_RAY_EXTRA_ENV_VARS_TO_COPY={name} on the driver"
        elif name == "HCCL_IF_IP" and not is_same(value, driver.address):
            value_here, copy = address if interface else "not set", ""
        else:
            continue
        warnings.append(
            f"VRA-257: {name}={value} was set on the driver's node {driver.address} only; on node {address} it is "
            f"{value_here}. If that is the wrong network, set {name} before `ray start` on this node{copy}."
        )
    return warnings


def selects_interface(name: str, setting: str, interface: str) -> bool:
    """Return whether ``setting`` selects ``interface``.

    HCCL takes prefixes, after "=" whole names, after "^" all others.
    """
    if name != "HCCL_SOCKET_IFNAME":
        return interface in setting.split(",")
    inverted, setting = setting.startswith("^"), setting.removeprefix("^")
    whole, setting = setting.startswith("="), setting.removeprefix("=")
    listed = [entry for entry in setting.split(",") if entry]
    return any(interface == entry if whole else interface.startswith(entry) for entry in listed) != inverted
