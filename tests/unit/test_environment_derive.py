"""A node's network settings from Ray's address, the user's own settings, and the driver's."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.derive import derive_network_settings, interface_with_address
from vllm_ray_ascend.environment.driver import (
    NETWORK_SETTINGS,
    DriverSettings,
    encode_driver_settings,
    parse_driver_settings,
)
from vllm_ray_ascend.environment.node import apply_network_settings, list_interfaces
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, scope_of

pytestmark = pytest.mark.unit

LISTED = [
    ("lo", "127.0.0.1"),
    ("lo", "::1"),
    ("eth0", "10.0.0.2"),
    ("eth0", "fe80::5%eth0"),
    ("bond1", "192.168.0.2"),
    ("bond1", "fd00::2"),
]
ETH0 = {
    "HCCL_IF_IP": "10.0.0.2",
    "HCCL_SOCKET_IFNAME": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0",
    "VLLM_HOST_IP": "10.0.0.2",
}
NETWORK = [name for group in NETWORK_SETTINGS for name in group]
HERE, ELSEWHERE = "10.0.0.2", "10.0.0.1"


def driver_at(address: str, everywhere: tuple[str, ...] = (), **variables: str) -> DriverSettings:
    return DriverSettings(address, variables, list(everywhere))


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("10.0.0.2", "eth0"),
        ("192.168.0.2", "bond1"),
        ("fd00::2", "bond1"),
        ("FD00:0::0002", "bond1"),
        ("fe80::5", "eth0"),
        ("fe80::5%eth0", "eth0"),
        ("::ffff:10.0.0.2", "eth0"),
        ("127.0.0.1", "lo"),
        ("127.0.0.7", "lo"),
        ("::1", "lo"),
        ("10.0.0.3", None),
        ("head.example", None),
    ],
)
def test_the_interface_that_carries_an_address(address: str, interface: str | None) -> None:
    assert interface_with_address(address, LISTED) == interface


def test_everything_unset_is_derived_from_rays_address() -> None:
    assert derive_network_settings(HERE, LISTED, {}) == (ETH0, [])
    assert derive_network_settings("127.0.0.1", LISTED, {}).variables == {
        "HCCL_IF_IP": "127.0.0.1",
        "HCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "TP_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
    }


@pytest.mark.parametrize("name", ["HCCL_IF_IP", "HCCL_SOCKET_IFNAME"])
def test_either_setting_of_hccl_on_the_node_leaves_both_alone(name: str) -> None:
    found = derive_network_settings(
        HERE, LISTED, {name: "mine"}, driver_at(HERE, HCCL_IF_IP="10.9.9.9", HCCL_SOCKET_IFNAME="drv")
    )
    assert found.variables == {k: v for k, v in ETH0.items() if not k.startswith("HCCL")} and found.warnings == []


def test_an_empty_value_counts_as_unset() -> None:
    assert derive_network_settings(HERE, LISTED, dict.fromkeys(ETH0, "")).variables == ETH0


def test_the_drivers_settings_apply_on_its_own_node() -> None:
    driver = driver_at(HERE, HCCL_SOCKET_IFNAME="bond1", VLLM_HOST_IP="192.168.0.2", HCCL_IF_BASE_PORT="50000")
    found = derive_network_settings(HERE, LISTED, {"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, driver)
    assert found.warnings == [] and found.variables == {
        "HCCL_SOCKET_IFNAME": "bond1",  # and no HCCL_IF_IP, which would override it
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
        "VLLM_HOST_IP": "192.168.0.2",
    }
    assert derive_network_settings(HERE, LISTED, {}, driver).variables["HCCL_IF_BASE_PORT"] == "50000"


def test_on_other_nodes_the_drivers_settings_only_cause_a_warning() -> None:
    driver = driver_at(ELSEWHERE, HCCL_SOCKET_IFNAME="bond1", HCCL_IF_BASE_PORT="50000", VLLM_HOST_IP=ELSEWHERE)
    assert derive_network_settings(HERE, LISTED, {}, driver) == (
        ETH0,
        [
            (
                "VRA-257: HCCL_SOCKET_IFNAME=bond1 was set on the driver's node 10.0.0.1 only; on node 10.0.0.2 it is "
                "eth0, which carries its address 10.0.0.2 in Ray. If that is the wrong network, set HCCL_SOCKET_IFNAME "
                "before `ray start` on this node, or VLLM_RAY_EXTRA_ENV_VARS_TO_COPY=HCCL_SOCKET_IFNAME on the driver."
            )
        ],
    )


def test_an_address_of_the_driver_in_another_network_causes_a_warning() -> None:
    assert derive_network_settings(HERE, LISTED, {}, driver_at(ELSEWHERE, HCCL_IF_IP=ELSEWHERE)).warnings == []
    assert derive_network_settings(HERE, LISTED, {}, driver_at(ELSEWHERE, HCCL_IF_IP="192.168.0.1")).warnings == [
        (
            "VRA-257: HCCL_IF_IP=192.168.0.1 was set on the driver's node 10.0.0.1 only; on node 10.0.0.2 it is "
            "10.0.0.2. If that is the wrong network, set HCCL_IF_IP before `ray start` on this node."
        )
    ]


@pytest.mark.parametrize("value", ["eth0", "eth", "=eth0,eth1", "^bond", "lo,eth"])
def test_a_setting_of_the_driver_that_fits_here_too_causes_no_warning(value: str) -> None:
    assert derive_network_settings(HERE, LISTED, {}, driver_at(ELSEWHERE, HCCL_SOCKET_IFNAME=value)).warnings == []


@pytest.mark.parametrize("value", ["bond1", "=eth", "^eth", "^=eth0"])
def test_a_setting_of_the_driver_that_does_not_fit_causes_a_warning(value: str) -> None:
    assert len(derive_network_settings(HERE, LISTED, {}, driver_at(ELSEWHERE, HCCL_SOCKET_IFNAME=value)).warnings) == 1


def test_what_was_set_on_the_node_causes_no_warning() -> None:
    driver = driver_at(ELSEWHERE, HCCL_SOCKET_IFNAME="bond1", GLOO_SOCKET_IFNAME="bond1")
    environ = {"HCCL_SOCKET_IFNAME": "bond1", "GLOO_SOCKET_IFNAME": "bond1"}
    assert derive_network_settings(HERE, LISTED, environ, driver).warnings == []


def test_what_the_user_wants_everywhere_is_set_everywhere() -> None:
    driver = driver_at(ELSEWHERE, ("HCCL_SOCKET_IFNAME",), HCCL_SOCKET_IFNAME="bond1")
    found = derive_network_settings(HERE, LISTED, {}, driver)
    assert "HCCL_IF_IP" not in found.variables and found.variables["HCCL_SOCKET_IFNAME"] == "bond1"
    assert found.warnings == []
    assert (
        derive_network_settings(HERE, LISTED, {"HCCL_IF_IP": HERE}, driver).variables.get("HCCL_SOCKET_IFNAME") is None
    )


def test_behind_nat_nothing_is_derived_and_the_warning_has_the_remedy() -> None:
    assert derive_network_settings("10.0.0.9", LISTED[:3], {"GLOO_SOCKET_IFNAME": "eth0"}) == (
        {},
        [
            (
                "VRA-256: No interface of this node has the address 10.0.0.9 by which Ray knows it (interfaces: lo "
                "127.0.0.1, lo ::1, eth0 10.0.0.2), as behind NAT or a container's port mapping, so "
                "HCCL_SOCKET_IFNAME, TP_SOCKET_IFNAME cannot be derived from it. Set them before `ray start` on this "
                "node; `ip -brief address` lists its interfaces."
            )
        ],
    )
    mine = dict.fromkeys(("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "eth0")
    assert derive_network_settings("10.0.0.9", LISTED, mine) == ({}, [])


SETTINGS = st.dictionaries(st.sampled_from(NETWORK), st.sampled_from(["", "eth0", "bond1", "10.0.0.2", "50000"]))


@given(st.sampled_from([HERE, ELSEWHERE, "127.0.0.1"]), SETTINGS, SETTINGS, st.sampled_from([HERE, ELSEWHERE]))
def test_properties(address: str, environ: dict[str, str], variables: dict[str, str], driver: str) -> None:
    variables = {name: value for name, value in variables.items() if value}
    found = derive_network_settings(address, LISTED, environ, DriverSettings(driver, variables)).variables
    assert not any(environ.get(name) for name in found)  # the node's own settings win
    if driver != address:
        assert (
            found == derive_network_settings(address, LISTED, environ).variables
        )  # and the driver's hold on its node only
    for group in NETWORK_SETTINGS:
        assert not (any(environ.get(name) for name in group) and any(name in found for name in group))
    assert (
        derive_network_settings(address, LISTED, {**environ, **found}, DriverSettings(driver, variables)).variables
        == {}
    )


def test_every_network_setting_has_the_scope_node() -> None:
    assert {scope_of(name) for name in NETWORK} == {"node"}


def test_driver_settings_round_trip_and_are_passed_on() -> None:
    environ = {
        "HCCL_SOCKET_IFNAME": "bond1",
        "HCCL_IF_IP": "",
        "PATH": "/bin",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "HCCL_SOCKET_IFNAME,GLOO_SOCKET_IFNAME",
    }
    text = encode_driver_settings(ELSEWHERE, environ)
    assert parse_driver_settings(text) == driver_at(ELSEWHERE, ("HCCL_SOCKET_IFNAME",), HCCL_SOCKET_IFNAME="bond1")
    assert encode_driver_settings(HERE, {DRIVER_VARIABLE: text, "HCCL_SOCKET_IFNAME": "eth0"}) == text
    assert parse_driver_settings(encode_driver_settings(HERE, {DRIVER_VARIABLE: "junk"})) == driver_at(HERE)


@pytest.mark.parametrize(
    "text", [None, "", "{}", "[]", "null", '{"address": 3, "variables": {}}', "\udc80", "[" * 9999]
)
def test_invalid_text_is_no_settings(text: str | None) -> None:
    assert parse_driver_settings(text) is None


@given(st.text())
def test_no_text_raises(text: str) -> None:
    parse_driver_settings(text)


def test_the_interfaces_of_this_machine() -> None:
    assert ("lo", "127.0.0.1") in list_interfaces()
    assert {name.partition(":")[0] for name, _ in list_interfaces()} <= {name for _, name in socket.if_nameindex()}


def test_apply_network_settings_sets_and_returns_what_is_unset() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "mine", "PATH": "/bin"}
    found = apply_network_settings("127.0.0.1", environ=environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "mine", "PATH": "/bin", **found.variables}
    assert found.variables["HCCL_SOCKET_IFNAME"] == "lo" and found.warnings == []
    assert apply_network_settings("127.0.0.1", environ=environ).variables == {}
