"""Addresses and names of nodes, in every form in which they are written."""

from __future__ import annotations

import socket

import pytest

from vllm_ray_ascend.addresses import (
    canonical,
    is_loopback,
    is_name,
    is_same,
    join_host_port,
    resolve,
    split_host_port,
    without_brackets,
)
from vllm_ray_ascend.cluster.audit import audit_node
from vllm_ray_ascend.cluster.connect import _with_port
from vllm_ray_ascend.cluster.node_facts import NodeFacts
from vllm_ray_ascend.environment.derive import derive_network_settings
from vllm_ray_ascend.environment.driver import DriverSettings

pytestmark = pytest.mark.unit

INTERFACES = [("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "10.0.0.2"), ("eth0", "fd00::1"), ("eth0", "fe80::1%eth0")]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:6379", "10.0.0.1", "6379"),
        ("10.0.0.1", "10.0.0.1", ""),
        ("head:6379", "head", "6379"),
        ("head.cluster.local", "head.cluster.local", ""),
        ("[fd00::1]:6379", "fd00::1", "6379"),
        ("[::1]", "::1", ""),
        ("fd00::1", "fd00::1", ""),
        ("fe80::1%eth0", "fe80::1%eth0", ""),
        ("auto", "auto", ""),
    ],
)
def test_host_and_port(text: str, host: str, port: str) -> None:
    assert split_host_port(text) == (host, port)
    assert not port or split_host_port(join_host_port(host, port)) == (host, port)


@pytest.mark.parametrize("text", ["fd00::1", "[fd00::1]", "FD00:0:0::1", "[fd00::1%eth0]", " fd00::1 "])
def test_one_form_for_comparisons(text: str) -> None:
    assert canonical(text) == "fd00::1" and is_same(text, "fd00::1") and not is_name(text)
    assert is_same("::ffff:10.0.0.1", "10.0.0.1") and is_same("Head", "head") and not is_same("head", "10.0.0.1")


def test_loopback_and_brackets() -> None:
    assert all(map(is_loopback, ["127.0.1.1", "::1", "[::1]", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["localhost", "10.0.0.1", "fd00::1", ""]))
    assert without_brackets("[::1]") == "::1" and without_brackets("[x") == "[x"


def test_names_are_resolved() -> None:
    assert resolve("localhost")[0] == "127.0.0.1" and set(map(is_loopback, resolve("localhost"))) == {True}
    assert resolve("[fd00::1]") == ["fd00::1"] and resolve("") == []
    assert resolve("no-such-host.invalid") == [] and resolve("a..b") == []
    assert resolve(socket.gethostname()) and not any(map(is_name, resolve(socket.gethostname())))


@pytest.mark.parametrize("address", ["fd00::1", "[fd00::1]", "FD00::0:1"])
def test_settings_are_derived_from_every_form(address: str) -> None:
    derived = derive_network_settings(address, INTERFACES, {}, None)
    assert derived.variables["HCCL_SOCKET_IFNAME"] == "eth0" and derived.warnings == []
    assert canonical(derived.variables["HCCL_IF_IP"]) == "fd00::1" and "[" not in derived.variables["VLLM_HOST_IP"]


def test_the_driver_is_recognized_in_every_form() -> None:
    driver = DriverSettings("fd00::1", {"TP_SOCKET_IFNAME": "ib0"})
    assert derive_network_settings("[fd00::1]", INTERFACES, {}, driver).variables["TP_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("address", "head"), [("fd00::1", "[fd00::1]:6379"), ("[fd00::1]", "[fd00::1]:6379")])
def test_a_head_is_not_asked_to_join_itself(address: str, head: str) -> None:
    (finding,) = audit_node(NodeFacts(address, "a", cann_devices=8, acl_importable=True), 0, 0, head)
    assert "`ray start --head --port=6379 " in finding.remedy and "--address=" not in finding.remedy
    (other,) = audit_node(NodeFacts("fd00::2", "b", cann_devices=8, acl_importable=True), 0, 0, head)
    assert "`ray start --address=[fd00::1]:6379 " in other.remedy


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("head", "head:6379"),
        ("10.0.0.1:1234", "10.0.0.1:1234"),
        ("fd00::1", "[fd00::1]:6379"),
        ("[fd00::1]", "[fd00::1]:6379"),
        ("[fd00::1]:1", "[fd00::1]:1"),
        ("auto", "auto"),
        ("ray://head:10001", "ray://head:10001"),
    ],
)
def test_the_address_of_a_cluster_to_look_at(given: str, taken: str) -> None:
    assert _with_port(given) == taken
