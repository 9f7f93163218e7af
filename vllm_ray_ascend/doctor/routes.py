"""Routes of this node to addresses of others: the kernel is asked, and nothing is sent."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_ray_ascend.doctor.records import Route

_ANY_PORT = 9
_GET_ROUTE, _NEW_ROUTE, _REQUEST = 26, 24, 1
_TO, _FROM, _LEAVES_BY = 1, 2, 4
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBBBBBI"), struct.Struct("=HH")
"""Those of rtnetlink(7): nlmsghdr, rtmsg, rtattr."""


def routes_as_dict(addresses: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    """Return this node's routes to these addresses, as plain data, for which `decode_routes` is the inverse.

    ``own`` are addresses of this node: where packets from them leave is looked up too.
    """
    routes: dict[str, Any] = msgspec.to_builtins({address: _route(address, own) for address in addresses})
    return routes


def decode_routes(values: Mapping[str, Any]) -> dict[str, Route]:
    """Return the routes by address of a dictionary that another version of this package may have made."""
    return msgspec.convert(values, dict[str, Route])


def _route(address: str, own: Sequence[str]) -> Route:
    """Return the route to an address: a socket for datagrams takes it when it is connected, and sends nothing."""
    leaving = {each: name for each in own if (name := _interface(address, each))}
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as unsent:
            unsent.connect((address, _ANY_PORT))
            return Route(str(unsent.getsockname()[0]), leaving=leaving)
    except OSError as error:
        return Route("", error.strerror or str(error), leaving)


def _interface(address: str, own: str) -> str:
    """Return the interface by which packets from an own address leave; empty where none is found.

    A socket that has the own address would not say: rules for senders (`ip rule from`) may choose another one.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(1.0)
            kernel.send(_question(address, own))
            return _interface_of_answer(kernel.recv(1 << 16))
    except OSError:
        return ""


def _question(address: str, own: str) -> bytes:
    family = _family(address)
    places = [(kind, socket.inet_pton(family, each)) for kind, each in ((_TO, address), (_FROM, own))]
    attributes = b"".join(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(place), kind) + place for kind, place in places)
    bits = 8 * len(places[0][1])
    body = _ROUTE.pack(family, bits, bits, 0, 0, 0, 0, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), _GET_ROUTE, _REQUEST, 0, 0) + body


def _interface_of_answer(answer: bytes) -> str:
    length, kind, *_ = _HEADER.unpack_from(answer)
    at = _HEADER.size + _ROUTE.size
    while kind == _NEW_ROUTE and at + _ATTRIBUTE.size <= length:
        size, attribute = _ATTRIBUTE.unpack_from(answer, at)
        if attribute == _LEAVES_BY:
            return socket.if_indextoname(struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)[0])
        at += max(_ATTRIBUTE.size, size + 3 & ~3)
    return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
