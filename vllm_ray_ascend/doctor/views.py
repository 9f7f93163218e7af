"""A node's record as checks look at it: answers read, findings made. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from vllm_ray_ascend.cluster.audit import Driver
from vllm_ray_ascend.cluster.findings import Finding, Severity
from vllm_ray_ascend.cluster.node_facts import STUCK
from vllm_ray_ascend.devices.cards import Die
from vllm_ray_ascend.doctor import parsers
from vllm_ray_ascend.doctor.queries import ADDRESS, HCCN_TOOL, LIST, Query, is_a3, ping_line
from vllm_ray_ascend.doctor.records import Level, NodeRecord, Output, RayNode

_MOUNT = {
    "hccn_tool": "In a container, mount the driver: `-v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro`.",
    "npu-smi": "In a container, mount it: `-v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro "
    "-v /usr/local/dcmi:/usr/local/dcmi:ro`.",
}
_REBOOT = "`sudo dmesg` there may say why; what waits inside the driver ends with a reboot of the host."
_AS_ROOT = "Start Ray as root there, or run `vllm-ray-ascend doctor --local` as root."

K = TypeVar("K")
T = TypeVar("T")

AtStart = Literal["skipped", "warns", "refuses"]
"""What a finding does before an engine starts: nothing, a warning in the log, or, if it is an error, no start."""


class NodeView:
    """One node. ``several``: whether other nodes of the cluster have NPUs too, so that the network between matters.

    None: not known, since this node was looked at alone.
    """

    def __init__(self, record: NodeRecord, *, several: bool | None, head_address: str, driver: Driver) -> None:
        self.record = record
        self.several = several
        self.head_address = head_address
        self.driver = driver

    @property
    def address(self) -> str:
        """Ray's address of the node."""
        return self.record.address

    @property
    def ray(self) -> RayNode | None:
        """What Ray has of the node; None where Ray was not looked at."""
        return self.record.ray

    @property
    def dies(self) -> Sequence[Die]:
        """Its NPUs as npu-smi lists them."""
        return self.record.facts.dies

    @property
    def is_a3(self) -> bool:
        """Whether its cards have two dies."""
        return is_a3(self.dies)

    @property
    def has_npus(self) -> bool:
        """Whether it has NPUs, or says so."""
        return has_npus(self.record)

    @property
    def is_idle(self) -> bool | None:
        """Whether Ray has given none of its NPUs to anybody; None where Ray was not looked at."""
        return None if self.ray is None else self.ray.free_npus >= self.ray.npus

    @property
    def has_roce(self) -> bool:
        """Whether a RoCE port has an address, or is to have one; True where that is not known."""
        answers = self.answers(ADDRESS)
        is_known = self.dies and len(answers) == len(self.dies)
        return not is_known or any(each.address for each in answers.values()) or bool(self.configured_addresses)

    @property
    def configured_addresses(self) -> dict[int, str]:
        """The addresses of RoCE ports in /etc/hccn.conf, by NPU."""
        return parsers.parse_configured_addresses(self.record.files.get("hccn.conf") or "")

    def answers(self, query: Query) -> dict[Die, Any]:
        """Return what the NPUs answered to a query; those that did not are in `unanswered`."""
        read = {die: query.parse(self._output(query.line(die)).text) for die in self.dies}
        return {die: value for die, value in read.items() if value is not None}

    def second_answers(self, query: Query) -> dict[Die, Any]:
        """Return what they answered when they were asked again."""
        read = {die: query.parse(self._output(query.second_line(die)).text) for die in self.dies}
        return {die: value for die, value in read.items() if value is not None}

    def unanswered(self, query: Query) -> dict[str, list[Die]]:
        """Return the NPUs that did not answer a query, by the reason."""
        answered = self.answers(query)
        reasons: defaultdict[str, list[Die]] = defaultdict(list)
        for die in self.dies:
            if die not in answered:
                reasons[_reason(self._output(query.line(die)), query.title)].append(die)
        return reasons

    def pings(self) -> dict[Die, tuple[str, Output]]:
        """Return the address that each NPU has pinged, and what the command wrote."""
        lines = {die: ping_line(die.physical_id, "") for die in self.dies}
        return {
            die: (each.removeprefix(line), output)
            for die, line in lines.items()
            for each, output in self.record.outputs.items()
            if each.startswith(line)
        }

    def properties(self, file: str) -> dict[str, str]:
        """Return the `name=value` lines of a collected file; none where it was not there."""
        return parsers.parse_properties(self.record.files.get(file) or "")

    @property
    def cann_version(self) -> str:
        """The release of CANN; empty where it is not known."""
        return parsers.parse_cann_version(self.properties("cann"))

    def finding(
        self, severity: Severity, code: str, text: str, remedy: str, die: Die | None = None, **values: Any
    ) -> Finding:
        """Return a finding of this node, or of one of its NPUs."""
        physical_id = None if die is None else die.physical_id
        return Finding(self.address, severity, code, text, remedy, physical_id, values=values)

    def unknown(self, reason: str, remedy: str, dies: Sequence[Die] = ()) -> Finding:
        """Return the finding of a check whose source is missing."""
        ids = [die.physical_id for die in dies]
        some = f" on NPU {', '.join(map(str, ids))}" if 0 < len(ids) < len(self.dies) else ""
        return self.finding("unknown", "VRA-601", f"could not be checked{some}: {reason}.", remedy, npus=ids)

    def unknown_answers(self, query: Query) -> Iterable[Finding]:
        """Yield a finding for each reason for which NPUs did not answer a query."""
        if not self.dies:
            output = self._output(LIST)
            yield self.unknown(f"{LIST} lists no NPU ({_reason(output, LIST)})", self._remedy(output, LIST))
        for reason, dies in self.unanswered(query).items():
            line = query.line(dies[0])
            yield self.unknown(reason, self._remedy(self._output(line), line), dies)

    def _output(self, line: str) -> Output:
        return self.record.outputs.get(line, Output(None, "it was not asked for"))

    def _remedy(self, output: Output, line: str) -> str:
        tool = line.partition(" ")[0]
        if output.code is None and "is not there" in output.text:
            return _MOUNT[tool]
        if output.code is None and STUCK in output.text:
            return _REBOOT
        if tool == HCCN_TOOL and not self.record.root:
            return _AS_ROOT
        return f"Run `{f'sudo {line}' if tool == HCCN_TOOL else line}` there to see why."


class Check(NamedTuple):
    """One check. ``judge`` gets a node, or with ``of_cluster`` the list of all nodes to which it applies."""

    name: str
    summary: str
    """What is looked at."""
    source: str
    """Where it is read."""
    judge: Callable[[Any], Iterable[Finding]]
    queries: tuple[Query, ...] = ()
    """What it asks NPUs: those that do not answer are reported as unknown."""
    level: Level = "quick"
    of_cluster: bool = False
    applies: Callable[[NodeView], bool] = lambda node: node.has_npus
    at_start: AtStart = "skipped"
    """Checks that are made before an engine starts have no ``queries``."""
    of_ray: bool = False
    """It judges what Ray has of the node, and finds nothing where Ray was not looked at."""
    also: tuple[str, ...] = ()
    """What else is collected for it alone, by names of queries.py."""


def has_npus(record: NodeRecord) -> bool:
    """Return whether a node has NPUs, or says so."""
    facts = record.facts
    return bool(facts.cann_devices or facts.device_files or facts.dies or (record.ray and record.ray.npus))


def on_several_nodes(node: NodeView) -> bool:
    """Return whether NPUs of this node talk to those of other nodes, or may."""
    return node.has_npus and node.several is not False


def with_roce(node: NodeView) -> bool:
    """Return whether NPUs of this node talk to those of other nodes through RoCE ports, or may."""
    return on_several_nodes(node) and (node.several is True or node.has_roce)


def on_a3(node: NodeView) -> bool:
    """Return whether this is an Atlas A3."""
    return node.is_a3


def on_every_node(node: NodeView) -> bool:
    """Return True: also on nodes without NPUs."""
    return True


def odd_ones(values: Mapping[K, T]) -> Iterator[tuple[K, T, K, T]]:
    """Yield each node, or NPU, whose value is not the most frequent one, and one that has that: both with their values.

    Of two equally frequent values the first wins.
    """
    if not values:
        return
    listed = list(values.values())
    usual = max(dict.fromkeys(listed), key=listed.count)
    example = next(key for key, value in values.items() if value == usual)
    yield from ((key, value, example, usual) for key, value in values.items() if value != usual)


def _reason(output: Output, title: str) -> str:
    """Return why an output does not answer."""
    if output.code is None:
        return output.text
    line = next((line.strip() for line in output.text.splitlines() if line.strip()), "")
    ended = f"ended with code {output.code}" if output.code else "is not understood"
    return f"{title} {ended}: {line!r}" if line else f"{title} wrote nothing"
