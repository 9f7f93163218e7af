"""What the tools print, in the words and forms of several releases; and other text, which must not break a parser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.doctor.machine import Machine
from vllm_ray_ascend.doctor import parsers
from vllm_ray_ascend.doctor.queries import QUERIES

pytestmark = pytest.mark.unit

ECC = """
    HBM Double Bit Error Count                    : 1
    HBM Double Bit Aggregate Total Err Cnt        : 4
    HBM Double Bit Isolated Pages Count           : 2
"""
LLDP = """Chassis ID TLV
\tMAC: 00:e0:fc:12:34:56
Port ID TLV
\tIfname: 400GE1/0/3:2
Time to Live TLV
\t120
System Name TLV
\tleaf-1
System Capabilities TLV
\tSystem capabilities: Bridge, Router
\tEnabled capabilities: {}
End of LLDPDU TLV
"""
MAC = "00:e0:fc:12:34:56"
CODES = ("80E01801", "80E18402")
PROCESSES = """
    Process id:207795  Process name:VLLMEngineCor     Process memory(MB):55436
    Process id:12      Process name:                  Process memory(MB):9
"""


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parsers.parse_health, "\tHealth Status                  : OK\n\tError Code : NA\n", ("OK", ())),
        (parsers.parse_health, "Health : Warning\n\n Error Code : 80E01801 80E18402\n", ("Warning", CODES)),
        (parsers.parse_health, "Invalid card id.\n", None),
        (parsers.parse_health, "\tHealth Status : NA\n", None),
        (parsers.parse_health, "\tHealth : -\n", None),
        (parsers.parse_ecc, "\tDDR Double Bit Error Count : 5\n\tHBM Double Bit Error Count : 0\n", (0, 0)),
        (parsers.parse_ecc, ECC, (4, 2)),
        (parsers.parse_processes, "\tNo process in device.\n\tChip ID : 0\n", []),
        (
            parsers.parse_processes,
            PROCESSES,
            [(207795, "VLLMEngineCor", 55436), (12, "", 9)],
        ),
        (parsers.parse_processes, "This device does not support querying proc-mem.\n", None),
        (parsers.parse_hbm_usage, "\tHBM Capacity(MB) : 65536\n\tHBM Usage Rate(%)              : 78\n", 78),
        (parsers.parse_temperature, "\tNPU Temperature (C)            : 41\n", 41),
        (parsers.parse_temperature, "Temperature(C) : 65\n", 65),
        (parsers.parse_compatibility, "\tCompatibility                  : OK\n", "OK"),
        (parsers.parse_hccs, "\thccs health status             : NOK\n", "NOK"),
        (parsers.parse_hccs, "HCCS Health Status: Healthy\n", "Healthy"),
        (parsers.parse_hccs, "hccs health status             : NA\n", None),
        (parsers.parse_compatibility, "Compatibility : NA\n", None),
        (parsers.parse_super_pod, "SDID : 16777216\nSuper Pod Size : 384\nServer Index : 4\n", (1 << 24, 384, 4, None)),
        (parsers.parse_super_pod, "SDID : 7\nSuper Pod Size : 2\nSuper Pod ID : 5\nServer Index : 4\n", (7, 2, 4, 5)),
        (parsers.parse_link, "link status: UP\n", "UP"),
        (parsers.parse_link, "[port 0] link status : DOWN\n", "DOWN"),
        (parsers.parse_link, "vnic link status: UP\n", "UP"),
        (parsers.parse_link, "[port 0] link status : UP\n[port 1] link status : DOWN\n", "DOWN"),
        (parsers.parse_link, "[port 0] link status : UP\n[port 1] link status : UP\n", "UP"),
        (parsers.parse_device_address, "ipaddr:11.12.165.7\nnetmask:255.255.255.0\n", ("11.12.165.7", "255.255.255.0")),
        (parsers.parse_device_address, "Get ipconf failed, because no ip was preset there!\n", ("", "")),
        (parsers.parse_gateway, "default gateway:11.12.165.1, Iface:eth0\n", "11.12.165.1"),
        (parsers.parse_gateway, "Get gateway failed, because no gateway was preset there!\n", ""),
        (parsers.parse_net_health, "net health status: Receive timeout\n", "Receive timeout"),
        (parsers.parse_net_health, "[port 0] net health status: Success\n[port 1] net health status: Fault\n", "Fault"),
        (parsers.parse_net_health, "net health status: \n", None),
        (parsers.parse_detected_address, "netdetect address: 11.12.165.1\n", "11.12.165.1"),
        (parsers.parse_detected_address, "netdetect addr:11.12.165.1\n", "11.12.165.1"),
        (parsers.parse_tls, "dev_id:0, tls switch[0](0:disable, 1:enable), tls preconfigured[1]\n", False),
        (parsers.parse_loss, "3 packets transmitted, 3 received, 0.00% packet loss\n", 0.0),
        (parsers.parse_loss, "3 packets transmitted, 1 received, 66.67% packets loss\n", 66.67),
        (parsers.parse_loss, "ping: timeout\n", None),
        (parsers.parse_tls, "dev_id:0, tls switch[1](0:disable, 1:enable)\n", True),
        (parsers.parse_speed, "Speed: 200000 Mb/s\n", 200000),
        (parsers.parse_speed, "Speed: Unknown!\n", None),
        (parsers.parse_mtu, "mtu:4200\n", 4200),
        (parsers.parse_link_history, "[devid 0]link up count       : 2\n[devid 0]link down count     : 1\n", (2, 1)),
        (parsers.parse_neighbour, LLDP.format("Bridge, Router"), (MAC, "400GE1/0/3:2", "leaf-1", True)),
        (parsers.parse_neighbour, LLDP.format("Station Only"), (MAC, "400GE1/0/3:2", "leaf-1", False)),
        (parsers.parse_neighbour, "Chassis ID TLV\n\tLocal: sw 7\nPort ID TLV\n\t4\n", ("sw 7", "4", "", True)),
        (parsers.parse_neighbour, "Cannot get lldp, ret 5\n", None),
        (parsers.parse_errors, "roce_rx_err_pkt_num:3\nroce_rx_all_pkt_num:99\n", {"roce_rx_err_pkt_num": 3}),
    ],
)  # fmt: skip
def test_outputs(parse: Callable[[str], Any], text: str, expected: Any) -> None:
    assert parse(text) == expected
    assert parse(f"\n\nWARNING: something else first\n{text}") == expected


def test_a_port_that_hears_nobody() -> None:
    assert parsers.parse_neighbour("\n") == parsers.Neighbour() and not parsers.Neighbour().chassis


def test_versions_and_ranges() -> None:
    ranges = parsers.parse_ranges("[6.4.0,6.4.99],[7.0.0,7.8.99],[23.0.rc2,23.0.rc2.]")
    assert ranges == [((6, 4, 0), (6, 4, 99)), ((7, 0, 0), (7, 8, 99))]
    for version, expected in (
        ("7.8.0.5.216", True),
        ("7.9.0", False),
        ("6.4.12.1.241", True),
        ("6.3", False),
        ("x", False),
    ):
        assert parsers.is_in_ranges(version, ranges) is expected
    assert parsers.inner_release("V100R001C23SPC002B212") == "V100R001C23" and parsers.inner_release("8.5") == ""


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("package_name=Ascend-cann-toolkit\nversion=8.5.1\n", "8.5.1"),
        ("Version=7.0.0\n", "7.0.0"),
        ("# version: 1.0\nruntime_running_version=[7.1.0.3.220:8.0.RC1]\n", "8.0.RC1"),
        ("runtime_running_version=[1:8.0]\ntoolkit_running_version=[1:8.5.1]\n", "8.5.1"),
        ("runtime_running_version=[]\n", ""),
        ("", ""),
    ],
)
def test_the_release_of_cann(text: str, release: str) -> None:
    assert parsers.parse_cann_version(parsers.parse_properties(text)) == release


def test_addresses_of_hccn_conf() -> None:
    text = "address_0=192.168.1.10\nnetmask_0=255.255.0.0\naddress_11 = 192.168.1.21\n#address_2=1\n"
    assert parsers.parse_configured_addresses(text) == {0: "192.168.1.10", 11: "192.168.1.21"}


def test_limits() -> None:
    text = """Limit                     Soft Limit           Hard Limit           Units
Max open files            20000                524288               files
Max locked memory         8388608              unlimited            bytes
"""
    assert parsers.parse_limits(text) == {"Max open files": (20000, 524288), "Max locked memory": (8388608, None)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--min_worker_port=10002 --max_worker_port=19999", (10002, 19999)),
        ("--min_worker_port=0 --max_worker_port=0", None),
        ("--min_worker_port=9 --max_worker_port=8", None),
        ("", None),
    ],
)
def test_worker_ports(options: str, expected: tuple[int, int] | None) -> None:
    assert parsers.parse_worker_ports(f"/ray/raylet --raylet_socket_name=x {options} --y") == expected


def test_listening_ports() -> None:
    text = """  sl  local_address rem_address   st tx_queue rx_queue
   0: 00000000:EE48 00000000:0000 0A 00000000:00000000 00:00000000
   1: 0100007F:1F90 0100007F:C001 01 00000000:00000000 00:00000000
"""
    assert parsers.parse_listening(text) == {61000}


@pytest.mark.parametrize("base", ["a2", "a3"])
def test_every_query_is_answered_on_a_recorded_machine(base: str) -> None:
    machine = Machine(base)
    record = machine.record()
    only_a3 = 3 if base == "a2" else 0
    assert (
        sum(query.line(record.facts.dies[0]) in record.outputs for query in QUERIES.values()) == len(QUERIES) - only_a3
    )
    for line, output in record.outputs.items():
        assert output.code == 0 and output.text.strip(), line


PARSERS = [
    *dict.fromkeys(query.parse for query in QUERIES.values()),
    parsers.parse_loss,
    parsers.parse_properties,
    parsers.parse_configured_addresses,
    parsers.parse_ranges,
    parsers.parse_limits,
    parsers.parse_listening,
    parsers.parse_worker_ports,
    parsers.inner_release,
]
WORDS = st.sampled_from(
    ["Chassis ID TLV\n", "Port ID TLV\n", "enabled capabilities", "Station Only", "Local:",
     "health status", "Health", ":", " : ", "link status", "UP", "netdetect addr", "ipaddr", "mtu", "tls switch[", "]",
     "\n", "\t", "hbm usage rate(%)", "Process id:", "Process name:", "Process memory(MB):", "[devid 0]", "sdid", "=",
     "server index", "[7.0.0,", "Max open files", "  ", "unlimited", "0A", "9" * 5000, "-1", "٣", "²", "no process"]
)  # fmt: skip


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: str(parse.__name__))
@given(text=st.one_of(st.text(), st.lists(st.one_of(WORDS, st.text(max_size=3), st.integers().map(str))).map("".join)))
def test_no_text_breaks_a_parser(parse: Callable[[str], Any], text: str) -> None:
    parse(text)


@given(pid=st.integers(1, 2**31), name=st.text("abcXYZ_-", max_size=15), megabytes=st.integers(0, 10**6))
def test_processes_are_read_back(pid: int, name: str, megabytes: int) -> None:
    text = f"Process id:{pid:<8} Process name:{name:<18} Process memory(MB):{megabytes}\n"
    assert parsers.parse_processes(text * 2) == [(pid, name, megabytes)] * 2
