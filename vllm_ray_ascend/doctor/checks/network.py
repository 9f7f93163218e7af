"""RoCE ports of the NPUs: links, addresses, TLS, and what must be equal over the cluster."""

from __future__ import annotations

import contextlib
import ipaddress
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_ray_ascend.cluster.findings import Finding, join
from vllm_ray_ascend.devices.cards import Die
from vllm_ray_ascend.doctor.parsers import Neighbour, parse_loss
from vllm_ray_ascend.doctor.queries import (
    ADDRESS,
    ERRORS,
    GATEWAY,
    LINK,
    LINK_HISTORY,
    MTU,
    NEIGHBOUR,
    NET_HEALTH,
    NETDETECT,
    SPEED,
    TLS,
    VNIC,
    Query,
    device_addresses,
    ping_line,
)
from vllm_ray_ascend.doctor.views import Check, NodeView, odd_ones, on_a3, with_roce

PING = "roce-ping"
"""The check for which nodes are asked a second time, when the addresses of the others are known."""
_FLAPS = 3
_SET_ADDRESS = "-ip -s address ADDRESS netmask {}"
_Port = tuple[NodeView, Die]


def check_link(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each NPU whose RoCE port has no link.

    Nodes of Atlas A3 that are connected by HCCS only have no link at all, which is noted.
    """
    states = {node: node.answers(LINK) for node in nodes}
    is_wired = any(state == "UP" for answers in states.values() for state in answers.values())
    for node, answers in states.items():
        for die, state in answers.items():
            if state != "UP":
                yield node.finding(
                    "info" if node.is_a3 and not is_wired else "error",
                    "VRA-650",
                    "its RoCE link is down.",
                    f"Check the cable, the optical module ({_tool(die, '-optical -g')}) and the "
                    f"switch's port; then {_tool(die, '-link -g')} there.",
                    die,
                )


def check_address(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each NPU whose RoCE port has no address; on Atlas A3, which has HCCS as well, a warning."""
    for die, found in node.answers(ADDRESS).items():
        if not found.address and _may_have_link(node, die):
            yield node.finding(
                "warning" if node.is_a3 else "error",
                "VRA-651",
                "its RoCE port has no address.",
                f"{_tool(die, _SET_ADDRESS.format('NETMASK'))} there.",
                die,
            )


def check_unique_addresses(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each RoCE port with an address that another one has."""
    owners: dict[str, str] = {}
    for node in nodes:
        for die, found in node.answers(ADDRESS).items():
            owner = f"NPU {die.physical_id} of node {node.address}"
            if found.address and owners.setdefault(found.address, owner) != owner:
                yield node.finding(
                    "error",
                    "VRA-652",
                    f"its RoCE port has the address {found.address} of {owners[found.address]}.",
                    f"{_tool(die, _SET_ADDRESS.format(found.netmask or 'NETMASK'))} there, with one that is free.",
                    die,
                    address=found.address,
                )


def check_configured_addresses(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each RoCE port whose address is not the one of /etc/hccn.conf, which it gets at a boot."""
    for die, found in node.answers(ADDRESS).items():
        configured = node.configured_addresses.get(die.physical_id)
        if configured and found.address and configured != found.address:
            yield node.finding(
                "warning",
                "VRA-627",
                f"its RoCE port has the address {found.address}, and {configured} in /etc/hccn.conf, which it gets at "
                "the next boot.",
                f"{_tool(die, _SET_ADDRESS.format(found.netmask or 'NETMASK'))} "
                "there with the right one, and the same in /etc/hccn.conf.",
                die,
                here=found.address,
                configured=configured,
            )


def check_gateway(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a warning for each port that has no gateway although that of an NPU with its number is in another network.

    A network for each number (a rail) is usual.
    """
    networks = {node: _networks(node) for node in nodes}
    of_number: defaultdict[int, set[str]] = defaultdict(set)
    for each in networks.values():
        for die, network in each.items():
            of_number[die.physical_id].add(network)
    for node, own in networks.items():
        gateways = node.answers(GATEWAY)
        for die, network in own.items():
            if gateways.get(die) == "" and (others := of_number[die.physical_id] - {network}):
                yield node.finding(
                    "warning",
                    "VRA-653",
                    f"its RoCE port is in {network} without a gateway, that of NPU {die.physical_id} of "
                    f"other nodes in {join(sorted(others))}.",
                    f"{_tool(die, '-gateway -s gateway ADDRESS')} there, or addresses of one network.",
                    die,
                    network=network,
                )


def check_net_health(node: NodeView) -> Iterator[Finding]:
    """Yield a finding for each NPU that does not reach the address that it is to ping."""
    for die, state in node.answers(NET_HEALTH).items():
        if state.lower() == "success" or not _may_have_link(node, die):
            continue
        yield node.finding(
            "warning" if state.lower() in ("init", "unknown") else "error",
            "VRA-654",
            f"its network health is {state!r}: it does not reach the address that it is to ping.",
            f"{_tool(die, '-netdetect -g')} there shows that address; "
            f"{_tool(die, '-netdetect -s address ADDRESS')} sets it, usually to the gateway.",
            die,
            state=state,
        )


def check_netdetect(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU that has no address to ping, so that its network health says nothing."""
    for die, address in node.answers(NETDETECT).items():
        if address in ("", "0.0.0.0"):
            yield node.finding(
                "warning",
                "VRA-655",
                "it has no address to ping, so its network health says nothing.",
                f"{_tool(die, '-netdetect -s address ADDRESS')} there, usually the gateway.",
                die,
            )


def check_tls(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each NPU whose TLS switch is not that of most: HCCL cannot connect the two."""
    switches = [enabled for node in nodes for enabled in node.answers(TLS).values()]
    for (node, die), enabled, usual in _odd_ports(nodes, TLS):
        yield node.finding(
            "error",
            "VRA-656",
            f"its RoCE port has TLS switched {_switch(enabled)}; of the cluster's {len(switches)} ports "
            f"{switches.count(usual)} have it {_switch(usual)}.",
            f"{_tool(die, f'-tls -s enable {int(usual)}')} there; or the same switch on all others, "
            f"where TLS is meant to be {_switch(enabled)}.",
            die,
            here=enabled,
            there=usual,
        )


def check_speed(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a warning for each NPU whose RoCE port is slower or faster than most."""
    for (node, die), speed, usual in _odd_ports(nodes, SPEED):
        yield node.finding(
            "warning",
            "VRA-657",
            f"its RoCE port runs at {speed} Mb/s, most of the cluster at {usual} Mb/s.",
            f"Check cable, optical module and the switch's port; {_tool(die, '-speed -g')} there.",
            die,
            here=speed,
            there=usual,
        )


def check_mtu(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a warning for each NPU whose RoCE port has another MTU than most."""
    for (node, die), mtu, usual in _odd_ports(nodes, MTU):
        yield node.finding(
            "warning",
            "VRA-658",
            f"its RoCE port has an MTU of {mtu}, most of the cluster {usual}.",
            f"{_tool(die, f'-mtu -s size {usual}')} there.",
            die,
            here=mtu,
            there=usual,
        )


def check_flapping(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU whose link went down several times since the node's start."""
    for die, history in node.answers(LINK_HISTORY).items():
        if history.downs >= _FLAPS:
            yield node.finding(
                "warning",
                "VRA-659",
                f"its RoCE link went down {history.downs} times since the node's start.",
                f"{_tool(die, '-link_stat -g')} there has the times; check cable and optical module.",
                die,
                downs=history.downs,
            )


def check_errors(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU whose counters of errors grew while doctor looked."""
    later = node.second_answers(ERRORS)
    for die, counters in node.answers(ERRORS).items():
        grown = {
            name: later[die][name] - count
            for name, count in counters.items()
            if die in later and later[die].get(name, 0) > count
        }
        if grown:
            yield node.finding(
                "warning",
                "VRA-660",
                f"errors of its RoCE port grow: {', '.join(f'{name} by {count}' for name, count in grown.items())}.",
                f"{_tool(die, '-stat -g')} there, twice; check the cable, the switch's PFC and ECN.",
                die,
                **grown,
            )


def check_switch_port(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield what LLDP says of the other ends of the RoCE ports' cables: a port that hears nobody is unknown.

    Nodes on different switches are usual, and a switch for each number of an NPU (a rail). Crossed cables are not: a
    port on the switch that similar nodes have for an NPU with another number.
    """
    heard: dict[NodeView, dict[Die, Neighbour]] = {node: node.answers(NEIGHBOUR) for node in nodes}
    for node, found in heard.items():
        silent = [die for die, each in found.items() if not each.chassis and _may_have_link(node, die)]
        if silent:
            yield node.unknown(
                "no LLDP neighbour is heard by its port",
                f"`lldp enable` on the switch; {_tool(silent[0], '-lldp -g')} there shows what is heard.",
                silent,
            )
        for die, each in found.items():
            if not each.is_switch:
                yield node.finding(
                    "info",
                    "VRA-664",
                    "its RoCE port is connected to another host without a switch.",
                    "Usual of two nodes; more of them need a switch to reach each other.",
                    die,
                    neighbour=each.chassis,
                )
    yield from _crossed(heard)


def _crossed(heard: Mapping[NodeView, Mapping[Die, Neighbour]]) -> Iterator[Finding]:
    """Yield a warning for each NPU on the switch of another number of those nodes that are connected like its own."""
    chassis = {node: {die.physical_id: each.chassis for die, each in found.items()} for node, found in heard.items()}
    for node, found in heard.items():
        own = chassis[node]
        alike = [each for each in chassis.values() if _count_equal(each, own) > len(own) / 2]
        usual = {npu: _most_frequent(npu, alike) for npu in own}
        for die, each in found.items():
            here, there = each.chassis, usual[die.physical_id]
            others = [npu for npu, switch in usual.items() if switch == here]
            if here and there and here != there and others:
                yield node.finding(
                    "warning",
                    "VRA-663",
                    f"its RoCE port is connected to switch {each.name or here} ({each.port}), where similar nodes have "
                    f"NPU {join(others)}, and NPU {die.physical_id} on another one: crossed cables?",
                    f"Compare {_tool(die, '-lldp -g')} on both nodes, and change the cables: traffic between NPUs of "
                    "one number takes more switches than it needs.",
                    die,
                    here=here,
                    there=there,
                )


def _count_equal(one: Mapping[int, str], other: Mapping[int, str]) -> int:
    return sum(1 for npu, switch in one.items() if switch and other.get(npu) == switch)


def _most_frequent(npu: int, nodes: Sequence[Mapping[int, str]]) -> str:
    """Return the switch that most of the nodes have for an NPU; of two equally frequent ones the first."""
    switches = [switch for each in nodes if (switch := each.get(npu))]
    return max(dict.fromkeys(switches), key=switches.count, default="")


def check_ping(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each NPU that does not reach the one with its number on the next node."""
    owners = {address: node for node in nodes for address in device_addresses(node.record).values()}
    for node in nodes:
        for die, (address, output) in node.pings().items():
            loss = parse_loss(output.text)
            if loss is None:
                first = (output.text.strip() or "nothing").splitlines()[0]
                yield node.unknown(f"hccn_tool -ping says {first!r}", "Run it there to see why.", [die])
            elif loss > 0:
                peer = owners[address].address if address in owners else "another node"
                yield node.finding(
                    "error",
                    "VRA-662",
                    f"{loss:g} % of the packets to NPU {die.physical_id} of {peer} ({address}) got lost.",
                    f"On both nodes {_tool(die, '-optical -g')} and {_tool(die, '-stat -g')}: "
                    "cable, optical module; then routes, VLAN, and the switches between. Again: "
                    f"`sudo {ping_line(die.physical_id, address)}` there.",
                    die,
                    address=address,
                    loss=loss,
                )


def check_vnic(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each die of an A3 whose virtual port is down, through which it reaches the super pod."""
    for die, state in node.answers(VNIC).items():
        if state != "UP":
            yield node.finding(
                "error",
                "VRA-661",
                "its virtual port (vNIC) is down, through which HCCL connects in the super pod.",
                f"{_tool(die, '-vnic -g')} there; reset the NPU.",
                die,
            )


def _tool(die: Die, options: str) -> str:
    """Return a command for one NPU, as root: hccn_tool answers nobody else."""
    return f"`sudo hccn_tool -i {die.physical_id} {options}`"


def _may_have_link(node: NodeView, die: Die) -> bool:
    """Return whether a port is not known to be down, which is a finding of its own."""
    return bool(node.answers(LINK).get(die) != "DOWN")


def _odd_ports(nodes: Sequence[NodeView], query: Query) -> Iterator[tuple[_Port, Any, Any]]:
    """Yield each NPU whose answer is not the most frequent one of the cluster, with both."""
    values: dict[_Port, Any] = {(node, die): value for node in nodes for die, value in node.answers(query).items()}
    yield from ((port, value, usual) for port, value, _, usual in odd_ones(values))


def _networks(node: NodeView) -> dict[Die, str]:
    """Return the network of each RoCE port, as far as it is known."""
    networks = {}
    for die, found in node.answers(ADDRESS).items():
        with contextlib.suppress(ValueError):
            networks[die] = str(ipaddress.ip_network(f"{found.address}/{found.netmask}", strict=False))
    return networks


def _switch(enabled: bool) -> str:
    return "on" if enabled else "off"


CHECKS = (
    Check(
        "roce-link",
        "RoCE ports have a link",
        "hccn_tool -link",
        check_link,
        (LINK,),
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "roce-address",
        "RoCE ports have addresses",
        "hccn_tool -ip",
        check_address,
        (ADDRESS,),
        applies=with_roce,
    ),
    Check(
        "hccn-conf",
        "RoCE ports have their address of hccn.conf",
        "hccn_tool -ip, /etc/hccn.conf",
        check_configured_addresses,
        (ADDRESS,),
        applies=with_roce,
    ),
    Check(
        "unique-addresses",
        "no two RoCE ports have one address",
        "hccn_tool -ip",
        check_unique_addresses,
        (ADDRESS,),
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "net-health",
        "RoCE ports reach their network",
        "hccn_tool -net_health",
        check_net_health,
        (NET_HEALTH,),
        applies=with_roce,
    ),
    Check(
        "tls",
        "TLS is equal on all RoCE ports",
        "hccn_tool -tls",
        check_tls,
        (TLS,),
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "gateway",
        "ports of several networks have gateways",
        "hccn_tool -gateway, -ip",
        check_gateway,
        (ADDRESS, GATEWAY),
        "full",
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "netdetect",
        "RoCE ports have an address to ping",
        "hccn_tool -netdetect",
        check_netdetect,
        (NETDETECT,),
        "full",
        applies=with_roce,
    ),
    Check(
        "speed",
        "RoCE ports are equally fast",
        "hccn_tool -speed",
        check_speed,
        (SPEED,),
        "full",
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "roce-mtu",
        "RoCE ports have one MTU",
        "hccn_tool -mtu",
        check_mtu,
        (MTU,),
        "full",
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        "flapping",
        "links do not go up and down",
        "hccn_tool -link_stat",
        check_flapping,
        (LINK_HISTORY,),
        "full",
        applies=with_roce,
    ),
    Check(
        "roce-errors",
        "no errors on RoCE ports now",
        "hccn_tool -stat, twice",
        check_errors,
        (ERRORS,),
        "full",
        applies=with_roce,
    ),
    Check(
        "switch-port",
        "RoCE ports hear their switch, and are on that of their number",
        "hccn_tool -lldp",
        check_switch_port,
        (NEIGHBOUR,),
        "full",
        of_cluster=True,
        applies=with_roce,
    ),
    Check(
        PING,
        "RoCE ports reach those of the next node",
        "hccn_tool -ping",
        check_ping,
        (ADDRESS,),
        "full",
        of_cluster=True,
        applies=lambda node: with_roce(node) and node.several is True and not node.is_a3,
    ),
    Check("vnic", "virtual ports are up (A3)", "hccn_tool -vnic", check_vnic, (VNIC,), "full", applies=on_a3),
)
