"""Findings: the NPUs that a node has against what it declares to Ray, each with the command that fixes it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from vllm_ray_ascend.addresses import is_same, split_host_port
from vllm_ray_ascend.cluster.findings import Finding, Severity, format_count, join
from vllm_ray_ascend.cluster.node_facts import NOSET, NodeFacts
from vllm_ray_ascend.devices.visible import (
    VISIBLE_DEVICES,
    format_ids,
    invalid_entry,
    split_entries,
    usable_physical_ids,
    warning_for,
)
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.settings import PREFIX, is_off

_PLUGINS = "VLLM_PLUGINS"
_OURS = "vllm-ray-ascend"
_SET_ENV = "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or where CANN is)"
_NOT_DETECTED = ": Ray can neither import CANN's Python module `acl` there nor find /dev/davinci*"
_BY_DETECTION = ", without NPU in --resources"


@dataclass(frozen=True)
class Driver:
    """The driver, to which nodes are compared: its package versions, and the switches that it passes to its workers."""

    versions: Mapping[str, str | None] = field(default_factory=dict)
    switches: Collection[str] = ()


class _Node(NamedTuple):
    """Facts and what is declared to Ray. ``present`` counts the node's NPUs, ``usable`` those that its list leaves."""

    facts: NodeFacts
    declared_npus: float
    declared_gpus: float
    head_address: str
    present: int
    usable: int
    list_error: str | None

    def error(self, code: str, text: str, remedy: str) -> Finding:
        return Finding(self.facts.address, "error", code, text, remedy)

    def warning(self, code: str, text: str, remedy: str) -> Finding:
        return Finding(self.facts.address, "warning", code, text, remedy)

    def can_detect_npus(self) -> bool:
        """Return whether `ray start` finds the NPUs itself: by CANN's Python module, or else by the device files."""
        return self.facts.acl_importable or bool(self.facts.device_files)


def audit_node(
    facts: NodeFacts, declared_npus: float, declared_gpus: float, head_address: str, driver: Driver | None = None
) -> list[Finding]:
    """Return what is wrong with a node that declares these NPUs and GPUs to the Ray cluster at ``head_address``.

    ``head_address`` is HOST:PORT. A node without any NPU has no findings. Where ``driver`` is given, the node is
    compared with it.
    """
    present = len(facts.device_files) if facts.cann_devices is None else facts.cann_devices
    if not declared_npus and not present:
        return []
    list_is_set = split_entries(facts.visible_devices) is not None  # a blank list hides NPUs on purpose
    node = _Node(
        facts,
        declared_npus,
        declared_gpus,
        head_address,
        present,
        usable=len(usable_physical_ids(facts.visible_devices, present)),
        list_error=invalid_entry(facts.visible_devices, present) if list_is_set else None,
    )
    driver = driver or Driver()
    found: dict[str, list[Finding | None]] = {
        "npus-declared": [_none_declared(node), _cann_missing(node), _too_many_declared(node), _npus_left_idle(node)],
        "plugin": [*_switched_off(node, driver), *_versions_differ(node, driver)],
        "visible-devices": [_list_cut_short(node), _list_rejected_by_new_cann(node), _noset_not_boolean(node)],
        "npu-counts": [*find_unequal_counts(facts)],
    }
    return [replace(finding, check=check) for check, findings in found.items() for finding in findings if finding]


UNANSWERED = "answer"
"""What stands for a check in the finding of a node that did not answer."""


def unreachable_finding(address: str, declared_npus: float, reason: str, version: str) -> Finding:
    """Return the finding of a node that did not report, because of ``reason``; ``version`` is ours on the driver.

    Our package missing there is an error where the engine may be placed; a slow node is only suspect.
    """
    if "vllm_ray_ascend" in reason and ("No module named" in reason or "cannot import" in reason):
        text = f"{_OURS} {version} is not installed there ({reason})."
        severity: Severity = "error" if declared_npus else "warning"
        return Finding(address, severity, "VRA-215", text, f"`pip install {_OURS}=={version}` there.")
    return Finding(
        address,
        "warning",
        "VRA-216",
        f"its NPUs could not be checked: {reason}.",
        "See `ray status`, and raylet.out in Ray's log folder there.",
        check=UNANSWERED,
    )


def raise_for_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Raise ClusterResourceError with every error of ``findings``, one a line; without errors, return the warnings."""
    findings = list(findings)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        lines = ["The engine cannot start on these nodes:", *map(str, errors)]
        raise ClusterResourceError("VRA-217", "\n".join(lines))
    return findings


def _none_declared(node: _Node) -> Finding | None:
    if node.declared_npus or not node.usable:
        return None
    if node.declared_gpus:
        return node.error(
            "VRA-201",
            f"it declares {format_count(node.declared_gpus, 'GPU')} and none of its "
            f"{format_count(node.usable, 'NPU')} to Ray: with --num-gpus Ray may or may not detect NPUs.",
            f"{_restart_commands(node)}, without --num-gpus.",
        )
    cause = "" if node.can_detect_npus() else _NOT_DETECTED
    prepare = _SET_ENV if node.facts.cann_devices is None else ""
    restart = _restart_commands(node, prepare, resources=node.usable)  # even where Ray could detect them: it did not
    return node.error(
        "VRA-202", f"it declares none of its {format_count(node.usable, 'NPU')} to Ray{cause}.", f"{restart}."
    )


def _cann_missing(node: _Node) -> Finding | None:
    if not node.declared_npus or node.facts.cann_devices is not None:
        return None
    return node.error(
        "VRA-203",
        f"it declares {format_count(node.declared_npus, 'NPU')} to Ray, but CANN counts none "
        f"({node.facts.cann_error}): workers inherit the environment of `ray start`.",
        f"{_restart_commands(node, _SET_ENV)}.",
    )


def _too_many_declared(node: _Node) -> Finding | None:
    all_hidden = node.list_error is not None and not node.usable
    if node.facts.cann_devices is None or (node.declared_npus <= node.usable and not all_hidden):
        return None
    counts = (
        f"it declares {format_count(node.declared_npus, 'NPU')} to Ray, but {node.usable} of {node.present} are usable"
    )
    current_list = f"{VISIBLE_DEVICES}={node.facts.visible_devices}"
    if node.list_error:
        what = f"{counts}: {current_list} {node.list_error}.{_cann_numbering(node)}"
        return node.error("VRA-204", what, f"{_fix_list(node)}.")
    if node.usable < node.present:
        return node.error("VRA-205", f"{counts}: {current_list} names no more.", f"{_restart_to_detect(node)}.")
    return node.error("VRA-206", f"{counts}: CANN counts no more.", f"{_restart_to_detect(node)}.")


def _switched_off(node: _Node, driver: Driver) -> list[Finding]:
    if not node.declared_npus:
        return []
    switches = {name: value for name, value in node.facts.switches.items() if name not in driver.switches}
    found = []
    if is_off(switches):
        restart = _restart_commands(node, f"`unset {PREFIX}`")
        found.append(node.error("VRA-207", f"{PREFIX}=0 is set there, which turns {_OURS} off.", f"{restart}."))
    plugins = switches.get(_PLUGINS)
    if plugins is not None and "ray_ascend" not in plugins.split(","):
        extended = ",".join(filter(None, [plugins, "ray_ascend"]))
        restart = _restart_commands(node, f"`export {_PLUGINS}={extended}`")
        found.append(node.error("VRA-208", f"{_PLUGINS}={plugins} there excludes {_OURS}.", f"{restart}."))
    return found


def _list_cut_short(node: _Node) -> Finding | None:
    if not node.list_error or not node.usable or node.declared_npus > node.usable:
        return None
    return node.warning(
        "VRA-209",
        f"{VISIBLE_DEVICES}={node.facts.visible_devices} {node.list_error}: {node.usable} of {node.present} NPUs are "
        f"usable.{_cann_numbering(node)}",
        f"{_fix_list(node)}.",
    )


def _list_rejected_by_new_cann(node: _Node) -> Finding | None:
    visible_devices = node.facts.visible_devices
    warning = warning_for(visible_devices, node.present)
    if not warning or not node.usable:
        return None
    ordered = format_ids(sorted(set(usable_physical_ids(visible_devices, node.present))))
    restart = _restart_commands(node, f"`export {VISIBLE_DEVICES}={ordered}`")
    return node.warning("VRA-210", f"{VISIBLE_DEVICES}={visible_devices!r} {warning}.", f"{restart}.")


def _npus_left_idle(node: _Node) -> Finding | None:
    if not 0 < node.declared_npus < node.usable:
        return None
    return node.warning(
        "VRA-211",
        f"it declares {node.declared_npus:g} of its {format_count(node.usable, 'NPU')} to Ray: the others stay idle.",
        f"To use them: {_restart_commands(node)}{_BY_DETECTION}.",
    )


def _noset_not_boolean(node: _Node) -> Finding | None:
    value = node.facts.noset
    if value is None or value.lower() in ("", "0", "false", "1", "true"):
        return None
    return node.warning(
        "VRA-212",
        f"{NOSET}={value} counts as false since Ray 2.54, which accepts only 1 and true. Workers of engines get 1 all "
        "the same.",
        f"For others: {_restart_commands(node, f'`export {NOSET}=1`')}.",
    )


def find_unequal_counts(facts: NodeFacts) -> list[Finding]:
    """Return a warning for each other count of a node's NPUs than CANN's, whatever Ray has of it."""
    cann_count, file_count = facts.cann_devices, len(facts.device_files)
    if cann_count is None:
        return []
    others = {"/dev/davinci* are": file_count or None, "`npu-smi info -m` lists": facts.npu_smi}
    return [
        Finding(
            facts.address,
            "warning",
            "VRA-213",
            f"CANN counts {format_count(cann_count, 'NPU')}, but {other} {number}. In a container with some of the "
            f"node's NPUs this is expected, and {VISIBLE_DEVICES} there takes CANN's numbers, from 0.",
            "Elsewhere `npu-smi info` shows which NPU is unhealthy.",
        )
        for other, number in others.items()
        if number not in (None, cann_count)
    ]


def _versions_differ(node: _Node, driver: Driver) -> list[Finding]:
    return [
        node.warning(
            "VRA-214",
            f"{package} {node.facts.versions.get(package) or 'is missing'} there, {version} on the driver's node.",
            f"`pip install {package}=={version}` there.",
        )
        for package, version in driver.versions.items()
        if version and node.facts.versions.get(package) != version
    ]


def _cann_numbering(node: _Node) -> str:
    """Return a note where CANN's numbers differ from those of the device files, as in a container with some NPUs."""
    files = node.facts.device_files
    if not files or files == tuple(range(len(files))):
        return ""
    return f" CANN numbers /dev/davinci{_format_range(files)} from 0."


def _fix_list(node: _Node) -> str:
    prepare = f"`unset {VISIBLE_DEVICES}` (or set it to numbers from 0 to {node.present - 1})"
    return _restart_commands(node, prepare, resources=0 if node.can_detect_npus() else node.present)


def _restart_to_detect(node: _Node) -> str:
    return _restart_commands(node) + (_BY_DETECTION if node.can_detect_npus() else "")


def _restart_commands(node: _Node, prepare: str = "", resources: int = 0) -> str:
    """Return the commands that restart Ray there, after ``prepare``; with the NPUs declared where Ray detects none."""
    host, port = split_host_port(node.head_address)
    is_head = is_same(node.facts.address, host)
    start = f"ray start --head --port={port}" if is_head else f"ray start --address={node.head_address}"
    if number := resources or (0 if node.can_detect_npus() else node.usable):
        start += f""" --resources='{{"NPU": {number}}}'"""
    steps = ["`ray stop` there", *filter(None, [prepare]), f"`{start}`"]
    rejoin = " (this is the head: join the other nodes again after it)" if is_head else ""
    return ", then ".join(steps) + rejoin


def _format_range(numbers: tuple[int, ...]) -> str:
    contiguous = numbers == tuple(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if contiguous and len(numbers) > 1 else join(numbers)
