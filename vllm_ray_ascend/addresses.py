"""Addresses of nodes as users, Ray and vLLM write them: IPv4, IPv6 in brackets or not, names. Pure but `resolve`."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

_Parsed = ipaddress.IPv4Address | ipaddress.IPv6Address


class HostPort(NamedTuple):
    """HOST:PORT in its parts. ``port`` is empty where none is given."""

    host: str
    port: str


def without_brackets(address: str) -> str:
    """Return an address as the system takes it: an IPv6 address without the brackets that a port needs around it."""
    text = address.strip()
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def split_host_port(text: str) -> HostPort:
    """Return the parts of HOST:PORT, [IPV6]:PORT, or of an address or a name without a port."""
    text = text.strip()
    if text.startswith("[") and "]" in text:
        host, _, rest = text[1:].partition("]")
        return HostPort(host, rest.removeprefix(":"))
    if text.count(":") > 1:
        parsed = _parse(text)
        host, _, port = text.rpartition(":")
        return HostPort(text, "") if parsed else HostPort(host, port)
    host, _, port = text.partition(":")
    return HostPort(host, port)


def join_host_port(host: str, port: str | int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    host = without_brackets(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def canonical(address: str) -> str:
    """Return an address for comparisons: one form however it is written, without brackets and scope.

    A name stays as it is, in lower case.
    """
    parsed = _parse(address)
    return without_brackets(address).lower() if parsed is None else str(parsed)


def is_same(one: str, other: str) -> bool:
    """Return whether both are the same address, or the same name."""
    return canonical(one) == canonical(other)


def is_loopback(address: str) -> bool:
    """Return whether it is an address of the loopback interface; a name is none."""
    parsed = _parse(address)
    return parsed is not None and parsed.is_loopback


def is_link_local(address: str) -> bool:
    """Return whether it is an address of one link, which of IPv6 means nothing without an interface."""
    parsed = _parse(address)
    return parsed is not None and parsed.is_link_local


def is_name(address: str) -> bool:
    """Return whether it is the name of a host, which has to be resolved."""
    return _parse(address) is None


def resolve(address: str) -> list[str]:
    """Return the addresses of a name, IPv4 first; an address is its own. Empty where nobody knows the name."""
    text = without_brackets(address)
    if not text or not is_name(text):
        return [text] if text else []
    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a label that is empty or too long
        return []
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(entry[4][0]) for entry in ordered))


def _parse(address: str) -> _Parsed | None:
    try:
        parsed = ipaddress.ip_address(without_brackets(address).partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
