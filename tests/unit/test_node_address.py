"""The address at which data parallel ranks meet, and nodes that are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vllm_ray_ascend.addresses import is_name
from vllm_ray_ascend.cluster.node_address import choose_master_address, find_nodes, resolve_rendezvous
from vllm_ray_ascend.errors import ClusterResourceError, PlacementError
from vllm_ray_ascend.ipc.sockets import listen

pytestmark = pytest.mark.unit

NAMES: Mapping[str, Sequence[str]] = {
    "localhost": ["127.0.0.1", "::1"],
    "debian": ["127.0.1.1"],
    "head": ["10.0.0.1"],
    "head-fast": ["192.168.50.1"],
    "second": ["10.0.0.2"],
    "both": ["10.0.0.1", "fd00::1"],
}
HERE = ["127.0.0.1", "::1", "10.0.0.1", "192.168.50.1", "fd00::1", "fe80::1%eth0"]


def resolver(name: str) -> Sequence[str]:
    return NAMES.get(name, []) if is_name(name) else [name]


def chosen(given: str, own: str = "10.0.0.1", interfaces: Sequence[str] = HERE) -> str:
    return choose_master_address(given, own, interfaces, ["10.0.0.1", "10.0.0.2"], resolver)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        pytest.param("", "10.0.0.1", id="none: Ray's, whatever the default route is"),
        pytest.param("10.0.0.1", "10.0.0.1", id="Ray's"),
        pytest.param("192.168.50.1", "192.168.50.1", id="of another interface: the user's wins"),
        pytest.param("head-fast", "192.168.50.1", id="its name"),
        pytest.param("head", "10.0.0.1", id="the node's name"),
        pytest.param("localhost", "10.0.0.1", id="other nodes cannot reach a loopback address"),
        pytest.param("debian", "10.0.0.1", id="as Debian resolves a host's own name"),
        pytest.param("[fd00::1]", "fd00::1", id="IPv6 of an interface"),
    ],
)
def test_the_master_address(given: str, address: str) -> None:
    assert chosen(given.strip("[]")) == address


def test_ipv6_clusters() -> None:
    assert chosen("both", own="fd00::1") == chosen("::1", own="fd00::1") == "fd00::1"
    assert chosen("FD00:0::1", own="fd00::1") == "fd00::1"


def test_a_cluster_on_the_loopback_interface() -> None:
    assert chosen("", own="127.0.0.1") == chosen("localhost", own="127.0.0.1", interfaces=["127.0.0.1"]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        ("second", "VRA-283", "is Ray's node 10.0.0.2, not this one"),
        ("10.0.0.2", "VRA-283", "run `vllm serve` on 10.0.0.2, or leave it out"),
        ("8.8.8.8", "VRA-283", "is no address of this node (10.0.0.1, 127.0.0.1, 192.168.50.1, ::1, fd00::1, fe80::1)"),
        ("nobody", "VRA-281", "cannot resolve it as a name (`getent hosts nobody`)"),
    ],
)
def test_addresses_of_others(given: str, code: str, text: str) -> None:
    with pytest.raises(PlacementError) as raised:
        chosen(given)
    assert raised.value.code == code and text in str(raised.value)


def test_a_node_behind_an_address_of_its_host() -> None:
    with pytest.raises(PlacementError, match=r"VRA-282: Ray's address of this node is 172.16.0.1, which no interface"):
        chosen("", own="172.16.0.1")


def test_where_processes_meet() -> None:
    assert resolve_rendezvous("localhost", resolver) == "127.0.0.1" and resolve_rendezvous("::1", resolver) == "::1"
    with pytest.raises(PlacementError, match="VRA-281"):
        resolve_rendezvous("nobody", resolver)


ROWS: list[dict[str, Any]] = [
    {"NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "a", "NodeName": "head-node", "Alive": True},
    {"NodeManagerAddress": "10.0.0.2", "NodeManagerHostname": "b", "NodeName": "10.0.0.2", "Alive": True},
    {"NodeManagerAddress": "fd00::3", "NodeManagerHostname": "c", "NodeName": "", "Alive": True},
    {"NodeManagerAddress": "10.0.0.4", "NodeManagerHostname": "d", "NodeName": "", "Alive": False},
]


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("10.0.0.2", "10.0.0.2"),
        ("A", "10.0.0.1"),
        ("head-node", "10.0.0.1"),
        ("second", "10.0.0.2"),
        ("[fd00::3]", "fd00::3"),
        ("FD00:0::3", "fd00::3"),
        ("d", "d"),
        ("10.0.0.9", "10.0.0.9"),
    ],
)
def test_nodes_are_found_by_address_and_name(entry: str, address: str) -> None:
    assert find_nodes([entry], ROWS, resolver) == {address}


def test_an_address_that_no_interface_has_is_named() -> None:
    """As of a wrong --node-ip-address; 198.51.100.0/24 is for documents (RFC 5737), so that no machine has it."""
    with pytest.raises(ClusterResourceError, match=r"VRA-286: Ray knows this node by 198\.51\.100\.1"):
        listen("198.51.100.1")
    with listen("localhost") as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
