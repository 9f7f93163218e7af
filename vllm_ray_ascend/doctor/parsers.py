"""What npu-smi, hccn_tool and version files say. Pure. None: the text does not say what it is asked for.

Releases differ in case, blanks and words, and some tools put alarms and other lines before: each parser looks for its
line anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Bounds = tuple[tuple[int, ...], tuple[int, ...]]


class Health(NamedTuple):
    """State of an NPU, such as "OK", "Warning", "Alarm", and the codes of its alarms."""

    state: str
    codes: tuple[str, ...]


class EccErrors(NamedTuple):
    """Double-bit errors of HBM, and the pages isolated because of such."""

    double_bit: int
    isolated_pages: int


class Process(NamedTuple):
    """A process that has memory of an NPU, as npu-smi names it: the driver's process id."""

    pid: int
    name: str
    megabytes: int


class DeviceAddress(NamedTuple):
    """Address of an NPU's RoCE port; empty where it has none."""

    address: str
    netmask: str


class SuperPod(NamedTuple):
    """Where an NPU of Atlas A3 stands in its super pod. ``pod``: which one; None where the tool does not say."""

    sdid: int
    size: int
    server_index: int
    pod: int | None = None


class LinkHistory(NamedTuple):
    """How often a RoCE link went up and down since the node's start."""

    ups: int
    downs: int


class Neighbour(NamedTuple):
    """What a RoCE port hears by LLDP of the other end of its cable; all empty where it hears nothing."""

    chassis: str = ""
    """Identity of the device, mostly a MAC address."""
    port: str = ""
    """The device's port, such as 400GE1/0/3."""
    name: str = ""
    is_switch: bool = True
    """False only where the device says that it neither bridges nor routes."""


def fields(text: str, name: str) -> list[str]:
    """Return the values of all lines `name : value`, whatever their case; lines may begin with a `[devid 0]`."""
    line = rf"^[^\S\n]*(?:\[[^\]\n]*\])?[^\S\n]*{name}[^\S\n]*:[^\S\n]*(\S.*?)?[^\S\n]*$"
    return [found[1] or "" for found in re.finditer(line, text, re.I | re.M)]


def field(text: str, name: str) -> str | None:
    """Return the value of the first such line."""
    return next(iter(fields(text, name)), None)


_NOTHING = ("", "-", "NA", "N/A")


def states(text: str, name: str) -> list[str]:
    """Return the values of these lines, without those by which the tool says that it has none."""
    return [value for value in fields(text, name) if value.upper() not in _NOTHING]


def state(text: str, name: str) -> str | None:
    """Return the first of these values."""
    return next(iter(states(text, name)), None)


def number(text: str, name: str) -> int | None:
    """Return the number in `name : 12 Mb/s`."""
    found = re.match(r"-?\d{1,18}(?!\d)", field(text, name) or "", re.ASCII)
    return int(found[0]) if found else None


def parse_health(text: str) -> Health | None:
    """Return the state in `npu-smi info -t health`. An alarm may have several codes, with blank lines between."""
    health = state(text, r"health(?: status)?")
    codes = dict.fromkeys(re.findall(r"\b(?:0x)?[0-9A-F]{8}\b", text))
    return Health(health, tuple(codes)) if health else None


def parse_ecc(text: str) -> EccErrors | None:
    """Return the sums of `npu-smi info -t ecc`, of HBM only: counts since the start and before."""
    double_bit = number(text, "hbm double bit error count")
    if double_bit is None:
        return None
    aggregate = number(text, "hbm double bit aggregate total err cnt") or 0
    return EccErrors(max(double_bit, aggregate), number(text, "hbm double bit isolated pages count") or 0)


def parse_processes(text: str) -> list[Process] | None:
    """Return the processes in `npu-smi info -t proc-mem`; names may be missing."""
    rows = re.findall(
        r"process id *: *(\d{1,18})\s+process name *: *(.*?)\s*process memory\(MB\) *: *(\d{1,18})", text, re.I
    )
    if rows:
        return [Process(int(pid), name, int(megabytes)) for pid, name, megabytes in rows]
    return [] if "no process" in text.lower() else None


def parse_hbm_usage(text: str) -> int | None:
    """Return the percentage in `npu-smi info -t usages`."""
    return number(text, r"hbm usage rate\(%\)")


def parse_temperature(text: str) -> int | None:
    """Return the degrees Celsius in `npu-smi info -t temp`."""
    found = number(text, r"npu temperature *\(c\)")
    return number(text, r"temperature *\(c\)") if found is None else found


def parse_compatibility(text: str) -> str | None:
    """Return whether driver and firmware fit, as `npu-smi info -t board` says: "OK", "NOK" or "Unknown"."""
    return state(text, "compatibility")


def parse_hccs(text: str) -> str | None:
    """Return the state of a die's HCCS links in `npu-smi info -t hccs`."""
    return state(text, "hccs health status")


def parse_super_pod(text: str) -> SuperPod | None:
    """Return the numbers in `npu-smi info -t spod-info`."""
    sdid, server = number(text, "sdid"), number(text, "server index")
    if sdid is None or server is None:
        return None
    return SuperPod(sdid, number(text, "super pod size") or 0, server, number(text, "super pod id"))


def parse_link(text: str) -> str | None:
    """Return UP or DOWN in `hccn_tool -link -g`, or `-vnic -g`; DOWN if any of several ports is."""
    states = {found.upper() for found in re.findall(r"link status *: *(up|down)\b", text, re.I)}
    return "DOWN" if "DOWN" in states else next(iter(states), None)


def parse_device_address(text: str) -> DeviceAddress | None:
    """Return the address in `hccn_tool -ip -g`; "no ip was preset there" is one without."""
    if "no ip was preset" in text:
        return DeviceAddress("", "")
    address = state(text, "ipaddr(?:ess)?")
    return DeviceAddress(address, field(text, "netmask") or "") if address else None


def parse_gateway(text: str) -> str | None:
    """Return the address in `hccn_tool -gateway -g`; empty where none is set."""
    if "no gateway was preset" in text:
        return ""
    found = re.search(r"default gateway *: *([^\s,]+)", text, re.I)
    return found[1] if found else None


def parse_net_health(text: str) -> str | None:
    """Return the state in `hccn_tool -net_health -g`: Success, Init, Socket fail, Receive timeout and others.

    Of several ports it is that of the first one that is no success.
    """
    found = states(text, "net health status")
    return next((each for each in found if each.lower() != "success"), next(iter(found), None))


def parse_detected_address(text: str) -> str | None:
    """Return the address that the port pings, in `hccn_tool -netdetect -g`; empty where none is set."""
    if "no netdetect" in text.lower():
        return ""
    return field(text, "netdetect addr(?:ess)?")


def parse_loss(text: str) -> float | None:
    """Return the percentage of lost packets in `hccn_tool -ping -g`."""
    found = re.search(r"(\d{1,3}(?:\.\d{1,9})?) *% *packets? loss", text, re.I | re.ASCII)
    return float(found[1]) if found else None


def parse_tls(text: str) -> bool | None:
    """Return whether TLS is on, in `hccn_tool -tls -g`."""
    found = re.search(r"tls switch\[(\d)\]", text)
    return found[1] == "1" if found else None


def parse_speed(text: str) -> int | None:
    """Return the Mb/s in `hccn_tool -speed -g`; "Unknown!" is no number."""
    return number(text, "speed")


def parse_mtu(text: str) -> int | None:
    """Return the bytes in `hccn_tool -mtu -g`."""
    return number(text, "mtu")


def parse_link_history(text: str) -> LinkHistory | None:
    """Return the counts in `hccn_tool -link_stat -g`."""
    ups, downs = number(text, "link up count"), number(text, "link down count")
    return None if ups is None or downs is None else LinkHistory(ups, downs)


def parse_neighbour(text: str) -> Neighbour | None:
    """Return what `hccn_tool -lldp -g` says, in the form of lldptool: the name of a TLV, its value on the next line."""
    if not text.strip():
        return Neighbour()
    chassis = _tlv(text, "chassis id")
    able = field(text, "enabled capabilities")
    is_switch = able is None or re.search("bridge|router", able, re.I) is not None
    return Neighbour(chassis, _tlv(text, "port id"), _tlv(text, "system name"), is_switch) if chassis else None


def _tlv(text: str, name: str) -> str:
    """Return the value of a TLV without its kind, such as `MAC: `; empty where the TLV is not there."""
    found = re.search(rf"^[^\S\n]*{name} tlv[^\S\n]*\n[^\S\n]*(?:\w+:[^\S\n]+)?(\S[^\n]*)", text, re.I | re.M)
    return found[1].strip() if found else ""


_ERROR_COUNTERS = ("roce_rx_err_pkt_num", "roce_tx_err_pkt_num", "roce_new_pkt_rty_num", "mac_rx_bad_pkt_num")


def parse_errors(text: str) -> dict[str, int] | None:
    """Return the counters of errors in `hccn_tool -stat -g`."""
    found = {name: count for name in _ERROR_COUNTERS if (count := number(text, name)) is not None}
    return found or None


def parse_properties(text: str) -> dict[str, str]:
    """Return the `name=value` lines of a version.info, or of an install.info."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}


def parse_cann_version(properties: Mapping[str, str]) -> str:
    """Return CANN's release in the properties of its install.info, or of its version.cfg; empty where there is none.

    A version.cfg has lines such as `toolkit_running_version=[7.1.0.3.220:8.0.RC1]`.
    """
    running = (properties.get(f"{part}_running_version", "") for part in ("toolkit", "runtime", "compiler"))
    releases = (each.strip("[] ").rpartition(":")[2] for each in running)
    return properties.get("version") or properties.get("Version") or next(filter(None, releases), "")


def parse_configured_addresses(text: str) -> dict[int, str]:
    """Return the addresses of RoCE ports by NPU in /etc/hccn.conf, lines such as `address_0=192.168.1.10`."""
    return {int(npu): address for npu, address in re.findall(r"^address_(\d{1,4}) *= *(\S+)", text, re.M | re.ASCII)}


def parse_ranges(text: str) -> list[Bounds]:
    """Return the ranges of `[7.0.0,7.8.99],[8.0.0,8.9.9]`; those of other forms are left out."""
    pairs = (found.split(",") for found in re.findall(r"\[([^\[\]]*)\]", text))
    bounds = ((_version(pair[0]), _version(pair[1])) for pair in pairs if len(pair) == 2)
    return [(low, high) for low, high in bounds if low and high]


def is_in_ranges(version: str, ranges: list[Bounds]) -> bool:
    """Return whether a version such as 7.8.0.5.216 lies in one of the ranges; their ends have fewer parts."""
    parts = _version(version)
    return any(low <= parts[: len(low)] and parts[: len(high)] <= high for low, high in ranges)


def inner_release(version: str) -> str:
    """Return the release in an inner version: V100R001C23 of V100R001C23SPC002B212; empty where there is none."""
    found = re.match(r"V\d+R\d+C\d+", version, re.ASCII)
    return found[0] if found else ""


def parse_limits(text: str) -> dict[str, tuple[int | None, int | None]]:
    """Return soft and hard limits of /proc/PID/limits by name; None: unlimited."""
    rows = re.findall(r"^(Max [a-z ]+?) {2,}(\d{1,20}|unlimited) +(\d{1,20}|unlimited)\b", text, re.M | re.ASCII)
    return {name: (_limit(soft), _limit(hard)) for name, soft, hard in rows}


def parse_worker_ports(command: str) -> tuple[int, int] | None:
    """Return the range of ports that a raylet gives to its workers, by its command line; None: the system chooses."""
    ends = [re.search(rf"--{end}_worker_port=(\d{{1,5}})\b", command, re.ASCII) for end in ("min", "max")]
    low, high = (int(end[1]) if end else 0 for end in ends)
    return (low, high) if 0 < low <= high else None


def parse_listening(text: str) -> set[int]:
    """Return the ports on which something listens, of /proc/net/tcp or tcp6."""
    rows = (line.split() for line in text.splitlines())
    local = (row[1] for row in rows if len(row) > 3 and row[3] == "0A")
    ports = (address.rpartition(":")[2] for address in local)
    return {int(port, 16) for port in ports if re.fullmatch(r"[0-9A-Fa-f]{4}", port)}


def _version(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})*)\s*", text, re.ASCII)
    return tuple(map(int, found[1].split("."))) if found else ()


def _limit(text: str) -> int | None:
    return None if text == "unlimited" else int(text)
