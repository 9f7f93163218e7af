"""Which address and interface of its host each node uses for HCCL, gloo and vLLM. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_ray_ascend.addresses import canonical, is_link_local, is_loopback, is_name
from vllm_ray_ascend.doctor.records import NodeRecord
from vllm_ray_ascend.environment.derive import Interface, interface_with_address, selects_interface
from vllm_ray_ascend.settings import variable_of

_VARIABLES = {
    "HCCL": ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"),
    "gloo": ("GLOO_SOCKET_IFNAME",),
    "vLLM": ("VLLM_HOST_IP",),
}
"""What chooses the address of each, the first that is set; else it is Ray's."""
_ADDRESSES = ("HCCL_IF_IP", "VLLM_HOST_IP")


class HostAddress(NamedTuple):
    """An address of a node, and what has chosen it: a variable, or Ray, where that is empty.

    ``address`` is empty where the variable selects no interface, ``interface`` where none has the address.
    """

    address: str
    interface: str
    variable: str = ""
    value: str = ""

    @property
    def is_target(self) -> bool:
        """Whether other nodes connect to it: a link-local address of IPv6 leads to them by its sender's interface."""
        return bool(self.interface) and not _is_of_link(self.address)

    def __str__(self) -> str:
        return f"{self.variable}={self.value}" if self.variable else f"its address {self.address}"


def host_addresses(record: NodeRecord) -> dict[str, HostAddress]:
    """Return the addresses of a node for HCCL, gloo and vLLM, as far as they are known.

    Where nothing is set and nothing is derived, each of them chooses in its own way: those are left out.
    """
    environment = record.environment
    is_derived = record.ray is not None and environment.get(variable_of("node_env")) != "off"
    found = {}
    for user, variables in _VARIABLES.items():
        variable = next((name for name in variables if environment.get(name)), "")
        if variable and not (variable in _ADDRESSES and is_name(environment[variable])):
            found[user] = _chosen(record, variable, environment[variable])
        elif not variable and is_derived:
            found[user] = HostAddress(record.address, interface_with_address(record.address, record.interfaces) or "")
    return found


def _chosen(record: NodeRecord, variable: str, value: str) -> HostAddress:
    if variable in _ADDRESSES:
        address = canonical(value)
        return HostAddress(address, interface_with_address(address, record.interfaces) or "", variable, value)
    matching = [each for each in record.interfaces if selects_interface(variable, value, each[0])]
    if value.startswith("^"):
        matching = [each for each in matching if not (is_loopback(each[1]) or is_link_local(each[1]))] or matching
    name, address = _preferred(matching, is_ipv6=_takes_ipv6(record, variable))
    return HostAddress(address, name, variable, value)


def _takes_ipv6(record: NodeRecord, variable: str) -> bool:
    """Return whether IPv6 is preferred: for HCCL where it is to be, for gloo where Ray has such an address."""
    if variable == "HCCL_SOCKET_IFNAME":
        return record.environment.get("HCCL_SOCKET_FAMILY") == "AF_INET6"
    return ":" in record.address


def _preferred(interfaces: Sequence[Interface], *, is_ipv6: bool) -> Interface:
    """Return the first of these with an address of IPv6, or of IPv4, or else the first one; none of a link only."""
    usable = [each for each in interfaces if not _is_of_link(each[1])]
    same = (each for each in usable if (":" in each[1]) == is_ipv6)
    return next(same, next(iter(usable), ("", "")))


def _is_of_link(address: str) -> bool:
    return ":" in address and is_link_local(address)


def carried_addresses(record: NodeRecord) -> frozenset[str]:
    """Return all addresses of a host, in the form for comparisons."""
    return frozenset(canonical(address) for _, address in record.interfaces)


def is_same_host(record: NodeRecord, carried: Collection[str], other: NodeRecord) -> bool:
    """Return whether another node is on this host, whose addresses are ``carried``.

    Nodes without network namespaces of their own share one.
    """
    return other is record or canonical(other.address) in carried


def route_targets(records: Sequence[NodeRecord]) -> list[list[str]]:
    """Return for each node the addresses of the others whose routes are to be looked up there."""
    used = [{chosen.address for chosen in host_addresses(record).values() if chosen.is_target} for record in records]
    targets = []
    for record in records:
        carried = carried_addresses(record)
        others = (each for other, each in zip(records, used, strict=True) if not is_same_host(record, carried, other))
        targets.append(sorted(set().union(*others)))
    return targets
