"""The commands that are run on a node, and what reads their output. None of them changes anything. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_ray_ascend.devices.cards import Die
from vllm_ray_ascend.doctor import parsers
from vllm_ray_ascend.doctor.records import NodeRecord

NPU_SMI, HCCN_TOOL = "npu-smi", "hccn_tool"


class Query(NamedTuple):
    """One command for each NPU: ``{card}`` and ``{chip}`` are npu-smi's numbers, ``{npu}`` is the physical id."""

    command: str
    parse: Callable[[str], Any]
    twice: bool = False
    """Run again at the end, for counters that must not grow."""
    only_a3: bool = False

    @property
    def title(self) -> str:
        """Return the command without the NPU's numbers."""
        return " ".join(word for word in self.command.split() if word not in ("-i", "-c") and "{" not in word)

    def line(self, die: Die) -> str:
        """Return the command line for one NPU."""
        return self.command.format(card=die.card, chip=die.chip, npu=die.physical_id)

    def second_line(self, die: Die) -> str:
        """Return the name of its second run."""
        return f"{self.line(die)} (again)"


def _smi(kind: str, parse: Callable[[str], Any], only_a3: bool = False) -> Query:
    return Query(f"{NPU_SMI} info -t {kind} -i {{card}} -c {{chip}}", parse, only_a3=only_a3)


def _hccn(options: str, parse: Callable[[str], Any], twice: bool = False, only_a3: bool = False) -> Query:
    return Query(f"{HCCN_TOOL} -i {{npu}} {options} -g", parse, twice, only_a3)


LIST = f"{NPU_SMI} info -m"
HEALTH = _smi("health", parsers.parse_health)
ECC = _smi("ecc", parsers.parse_ecc)
PROCESSES = _smi("proc-mem", parsers.parse_processes)
HBM = _smi("usages", parsers.parse_hbm_usage)
TEMPERATURE = _smi("temp", parsers.parse_temperature)
HCCS = _smi("hccs", parsers.parse_hccs, only_a3=True)
SUPER_POD = _smi("spod-info", parsers.parse_super_pod, only_a3=True)
BOARD = Query(f"{NPU_SMI} info -t board -i {{card}}", parsers.parse_compatibility)
LINK = _hccn("-link", parsers.parse_link)
ADDRESS = _hccn("-ip", parsers.parse_device_address)
NET_HEALTH = _hccn("-net_health", parsers.parse_net_health)
TLS = _hccn("-tls", parsers.parse_tls)
GATEWAY = _hccn("-gateway", parsers.parse_gateway)
NETDETECT = _hccn("-netdetect", parsers.parse_detected_address)
SPEED = _hccn("-speed", parsers.parse_speed)
MTU = _hccn("-mtu", parsers.parse_mtu)
LINK_HISTORY = _hccn("-link_stat", parsers.parse_link_history)
ERRORS = _hccn("-stat", parsers.parse_errors, twice=True)
NEIGHBOUR = _hccn("-lldp", parsers.parse_neighbour)
VNIC = _hccn("-vnic", parsers.parse_link, only_a3=True)

SERVE_LLM = "serve-llm"
"""No command: asks for what Ray Serve LLM imports, for which files of Ray and vLLM are read."""
ROUTES = "routes"
"""No command: asks for interfaces and, once all nodes have answered, for the routes to the others."""
ENGINES = "engines"
"""No command: asks Ray's control store for the engines that run."""
_MODEL = "model "

QUERIES = {
    query.command: query
    for query in (
        HEALTH, ECC, PROCESSES, HBM, TEMPERATURE, HCCS, SUPER_POD, BOARD, LINK, ADDRESS, NET_HEALTH, TLS, GATEWAY,
        NETDETECT, SPEED, MTU, LINK_HISTORY, ERRORS, NEIGHBOUR, VNIC,
    )
}  # fmt: skip
"""All of them by their commands, which nodes are given: one that another version of this package knows is left out."""


def model_command(path: str) -> str:
    """Return what asks a node for the files of a model; an earlier version of this package there leaves it out."""
    return f"{_MODEL}{path}"


def model_path(commands: Iterable[str]) -> str:
    """Return the path of the model that is asked for; empty where none is."""
    return next((command.removeprefix(_MODEL) for command in commands if command.startswith(_MODEL)), "")


def is_a3(dies: Sequence[Die]) -> bool:
    """Return whether these are the NPUs of an Atlas A3, whose cards have two dies."""
    return len({die.card for die in dies}) < len(dies)


def command_lines(dies: Sequence[Die], commands: Iterable[str]) -> list[str]:
    """Return every command line that asks these NPUs the queries with these commands, each once."""
    return list(dict.fromkeys(query.line(die) for query in _queries_of(dies, commands) for die in dies))


def second_command_lines(dies: Sequence[Die], commands: Iterable[str]) -> list[tuple[str, str]]:
    """Return the command lines that are run twice, each with the name of its second run."""
    twice = [query for query in _queries_of(dies, commands) if query.twice]
    return [(query.line(die), query.second_line(die)) for query in twice for die in dies]


def _queries_of(dies: Sequence[Die], commands: Iterable[str]) -> list[Query]:
    known = [QUERIES[command] for command in commands if command in QUERIES]
    return [query for query in known if is_a3(dies) or not query.only_a3]


def device_addresses(record: NodeRecord) -> dict[Die, str]:
    """Return the addresses of a node's RoCE ports."""
    lines = {die: ADDRESS.line(die) for die in record.facts.dies}
    found = {die: ADDRESS.parse(record.outputs[line].text) for die, line in lines.items() if line in record.outputs}
    return {die: answer.address for die, answer in found.items() if answer is not None}


def ping_line(physical_id: int, address: str) -> str:
    """Return the command line by which an NPU pings an address through its RoCE port."""
    return f"{HCCN_TOOL} -i {physical_id} -ping -g address {address}"


def ping_lines(addresses: Sequence[Mapping[Die, str]]) -> list[list[str]]:
    """Return for each node, of whose NPUs these are the addresses, what is to be run there.

    Each NPU pings the one with its number on the next node: every port sends and answers once.
    """
    lines = []
    for position, own in enumerate(addresses):
        peers = {die.physical_id: address for die, address in addresses[(position + 1) % len(addresses)].items()}
        ids = [die.physical_id for die, address in own.items() if address]
        lines.append([ping_line(npu, peers[npu]) for npu in ids if peers.get(npu) and len(addresses) > 1])
    return lines
