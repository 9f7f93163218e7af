"""What NPUs a node has against what Ray was told, and the command that mends it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm_ray_ascend.cluster.node_facts import NOSET, NodeFacts
from vllm_ray_ascend.devices.visible import VARIABLE, caution, entries, listed, parse, rejected
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.settings import PREFIX, is_off

_PLUGINS = "VLLM_PLUGINS"
_OURS = "vllm-ray-ascend"
_SET_ENV = "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or where CANN is)"
_BLIND = ": it can neither import CANN's Python module `acl` there nor find /dev/davinci*"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a node. An error makes an engine on that node fail; ``text`` ends with the remedy."""

    address: str
    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"node {self.address}: {self.text}"


@dataclass(frozen=True)
class Driver:
    """The driver, to which nodes are compared: its package versions, and the switches that it hands to its workers."""

    versions: Mapping[str, str | None] = field(default_factory=dict)
    switches: Collection[str] = ()


class _Node(NamedTuple):
    """Facts beside what Ray was told. ``there`` are the node's NPUs, ``usable`` those that its visible list leaves."""

    facts: NodeFacts
    npus: float
    gpus: float
    head_address: str
    there: int
    usable: int
    list_fault: str | None


def findings(
    facts: NodeFacts, declared_npus: float, declared_gpus: float, head_address: str, driver: Driver | None = None
) -> list[Finding]:
    """What is wrong with a node that declares these NPUs and GPUs to the Ray cluster at ``head_address`` (HOST:PORT).

    A node without any NPU has no findings. ``driver`` is compared with where it is given.
    """
    count = len(facts.device_files) if facts.cann_devices is None else facts.cann_devices
    if not declared_npus and not count:
        return []
    usable = len(parse(facts.visible, count))
    fault = rejected(facts.visible, count) if entries(facts.visible) else None  # a blank list hides NPUs on purpose
    node = _Node(facts, declared_npus, declared_gpus, head_address, count, usable, fault)
    errors = [_not_told(node), _no_cann(node), _too_many(node), *_switched_off(node, driver or Driver())]
    warnings = [
        _list_stops(node),
        _list_refused(node),
        _idle(node),
        _noset(node),
        *_disagreements(node),
        *_versions(node, driver or Driver()),
    ]
    return [
        *(Finding(facts.address, "error", text) for text in errors if text),
        *(Finding(facts.address, "warning", text) for text in warnings if text),
    ]


def unreachable(address: str, declared_npus: float, reason: str, version: str) -> Finding:
    """The finding of a node that could not be asked, because of ``reason``; ``version`` is the driver's of our package.

    Our package missing there is an error where the engine may be placed; a slow node is only suspect.
    """
    if "vllm_ray_ascend" in reason and ("No module named" in reason or "cannot import" in reason):
        text = f"{_OURS} {version} is not installed there ({reason}). `pip install {_OURS}=={version}` there."
        return Finding(address, "error" if declared_npus else "warning", text)
    text = f"its NPUs could not be checked: {reason}. `ray status` and raylet.out in Ray's log folder there say more."
    return Finding(address, "warning", text)


def refuse(found: Iterable[Finding]) -> list[Finding]:
    """The warnings among ``found``. Raises ClusterResourceError with every error, one a line, where there is any."""
    found = list(found)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        raise ClusterResourceError("\n".join(map(str, errors)))
    return found


def _not_told(node: _Node) -> str | None:
    if node.npus or not node.usable:
        return None
    if node.gpus:
        return (
            f"Ray was told of {_count(node.gpus, 'GPU')} and of none of its {_count(node.usable, 'NPU')}: with "
            f"--num-gpus it is chance whether Ray looks for NPUs. {_restart(node)}, without --num-gpus."
        )
    blind = "" if _ray_can_count(node) else _BLIND
    prepare = _SET_ENV if node.facts.cann_devices is None else ""
    start = _restart(node, prepare=prepare, resources=node.usable)  # even where Ray could count: it did not
    return f"Ray was told of none of its {_count(node.usable, 'NPU')}{blind}. {start}."


def _no_cann(node: _Node) -> str | None:
    if not node.npus or node.facts.cann_devices is not None:
        return None
    return (
        f"Ray was told of {_count(node.npus, 'NPU')}, but CANN counts none ({node.facts.cann_error}): workers have the "
        f"environment of `ray start`. {_restart(node, prepare=_SET_ENV)}."
    )


def _too_many(node: _Node) -> str | None:
    hides_all = node.list_fault is not None and not node.usable
    if node.facts.cann_devices is None or (node.npus <= node.usable and not hides_all):
        return None
    told = f"Ray was told of {_count(node.npus, 'NPU')}, but {node.usable} of {node.there} can be used"
    if node.list_fault:
        return f"{told}: {VARIABLE}={node.facts.visible} {node.list_fault}.{_subset(node)} {_mend_list(node)}."
    if node.usable < node.there:
        return f"{told}: {VARIABLE}={node.facts.visible} leaves no more. {_recount(node)}."
    return f"{told}: CANN counts no more. {_recount(node)}."


def _list_stops(node: _Node) -> str | None:
    if not node.list_fault or not node.usable or node.npus > node.usable:
        return None
    return (
        f"{VARIABLE}={node.facts.visible} {node.list_fault}: {node.usable} of {node.there} NPUs can be used."
        f"{_subset(node)} {_mend_list(node)}."
    )


def _list_refused(node: _Node) -> str | None:
    stricter = caution(node.facts.visible, node.there)
    if not stricter or not node.usable:
        return None
    ordered = listed(sorted(set(parse(node.facts.visible, node.there))))
    return f"{VARIABLE}={node.facts.visible!r} {stricter}. {_restart(node, prepare=f'`export {VARIABLE}={ordered}`')}."


def _idle(node: _Node) -> str | None:
    if not 0 < node.npus < node.usable:
        return None
    return (
        f"Ray was told of {node.npus:g} of its {_count(node.usable, 'NPU')}: the others lie idle. To use them: "
        f"{_restart(node)}, without a number of NPUs."
    )


def _noset(node: _Node) -> str | None:
    value = node.facts.noset
    if value is None or value.lower() in ("", "0", "false", "1", "true"):
        return None
    return (
        f"{NOSET}={value} counts as false since Ray 2.54, which takes only 1 and true. "
        "Workers of this engine have 1 all the same; for "
        f"others: {_restart(node, prepare=f'`export {NOSET}=1`')}."
    )


def _disagreements(node: _Node) -> list[str]:
    counted, files, chips = node.facts.cann_devices, node.facts.device_files, node.facts.npu_smi
    if counted is None:
        return []
    others = {"/dev/davinci* are": len(files) or None, "`npu-smi info -m` lists": chips}
    return [
        f"CANN counts {_count(counted, 'NPU')}, but {other} {number}. In a container with some of the node's NPUs this "
        f"is right, and {VARIABLE} there has CANN's numbers, from 0 on; elsewhere `npu-smi info` shows which is unwell."
        for other, number in others.items()
        if number not in (None, counted)
    ]


def _switched_off(node: _Node, driver: Driver) -> list[str]:
    if not node.npus:
        return []
    switches = {name: value for name, value in node.facts.switches.items() if name not in driver.switches}
    texts = []
    if is_off(switches):
        texts.append(
            f"{PREFIX}=0 is set there, which turns {_OURS} off. {_restart(node, prepare=f'`unset {PREFIX}`')}."
        )
    plugins = switches.get(_PLUGINS)
    if plugins is not None and "ray_ascend" not in plugins.split(","):
        mended = ",".join(filter(None, [plugins, "ray_ascend"]))
        texts.append(
            f"{_PLUGINS}={plugins} there leaves {_OURS} out. {_restart(node, prepare=f'`export {_PLUGINS}={mended}`')}."
        )
    return texts


def _versions(node: _Node, driver: Driver) -> list[str]:
    return [
        f"{package} {node.facts.versions.get(package) or 'is missing'} there, {version} on the driver's node. "
        f"`pip install {package}=={version}` there."
        for package, version in driver.versions.items()
        if version and node.facts.versions.get(package) != version
    ]


def _ray_can_count(node: _Node) -> bool:
    """Whether `ray start` finds the NPUs itself: by CANN's Python module, or without it by the device files."""
    return node.facts.acl_importable or bool(node.facts.device_files)


def _subset(node: _Node) -> str:
    files = node.facts.device_files
    if not files or files == tuple(range(len(files))):
        return ""
    return f" CANN numbers /dev/davinci{_span(files)} from 0 on."


def _mend_list(node: _Node) -> str:
    prepare = f"`unset {VARIABLE}` (or set it to numbers from 0 to {node.there - 1})"
    return _restart(node, prepare=prepare, resources=0 if _ray_can_count(node) else node.there)


def _recount(node: _Node) -> str:
    return _restart(node) + (", without a number of NPUs" if _ray_can_count(node) else "")


def _restart(node: _Node, prepare: str = "", resources: int = 0) -> str:
    """The commands that start Ray anew there, after ``prepare``; with a number of NPUs where Ray cannot count them."""
    host, _, port = node.head_address.rpartition(":")
    is_head = node.facts.address == host
    start = f"ray start --head --port={port}" if is_head else f"ray start --address={node.head_address}"
    if number := resources or (0 if _ray_can_count(node) else node.usable):
        start += f""" --resources='{{"NPU": {number}}}'"""
    steps = ["`ray stop` there", *filter(None, [prepare]), f"`{start}`"]
    again = " (this is the head: join the other nodes again after it)" if is_head else ""
    return ", then ".join(steps) + again


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}{'' if number == 1 else 's'}"


def _span(numbers: tuple[int, ...]) -> str:
    contiguous = numbers == tuple(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if contiguous and len(numbers) > 1 else ", ".join(map(str, numbers))
