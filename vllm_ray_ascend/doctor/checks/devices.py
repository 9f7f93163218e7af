"""NPUs: device files and permissions, what Ray counts, health, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from vllm_ray_ascend.cluster.audit import audit_node, find_unequal_counts
from vllm_ray_ascend.cluster.findings import Finding, Severity, format_count, join
from vllm_ray_ascend.devices.cards import Die
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, usable_physical_ids
from vllm_ray_ascend.doctor.queries import (
    ECC,
    HBM,
    HCCS,
    HEALTH,
    LIST,
    PROCESSES,
    SUPER_POD,
    TEMPERATURE,
)
from vllm_ray_ascend.doctor.records import Holder
from vllm_ray_ascend.doctor.views import Check, NodeView, on_a3

_MANAGERS = ("davinci_manager", "devmm_svm", "hisi_hdc")
_HOT_C = 85
_IDLE_HBM_PERCENT = 12
"""An idle NPU has about 3 to 5 % of its HBM in use."""
_IN_CONTAINER = "`docker run --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc`"


def _audit(name: str, summary: str, source: str) -> Check:
    """Return the check ``name`` of the audit, whose errors keep an engine from starting."""

    def judge(node: NodeView) -> Iterator[Finding]:
        if node.ray is None:
            return
        found = audit_node(node.record.facts, node.ray.npus, node.ray.gpus, node.head_address, node.driver)
        yield from (finding for finding in found if finding.check == name)

    return Check(name, summary, source, judge, at_start="refuses", of_ray=True)


def check_split_cards(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each card of which Ray has one die only: another owner shares its bandwidth, or it idles."""
    facts = node.record.facts
    usable = set(usable_physical_ids(facts.visible_devices, facts.cann_devices or 0))
    cards: defaultdict[int, list[int]] = defaultdict(list)
    for die in node.dies:
        cards[die.card].append(die.physical_id)
    for card, ids in cards.items():
        if usable & set(ids) and not usable >= set(ids):
            yield node.finding(
                "warning",
                "VRA-635",
                f"{VISIBLE_DEVICES}={facts.visible_devices} names NPU {join(sorted(usable & set(ids)))} of card "
                f"{card}, whose dies are NPU {join(ids)}: they share the card's bandwidth.",
                f"Name both dies of a card in {VISIBLE_DEVICES} before `ray start` there, or none.",
                card=card,
            )


def check_device_files(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each file that every process needs beside its NPU's, and where those of the NPUs are missing.

    CANN that counts NPUs has the former, but counts without the latter. Software NPUs have no files at all.
    """
    facts = node.record.facts
    if facts.cann_devices and not facts.device_files and "davinci_manager" in node.record.devices:
        yield node.finding(
            "error",
            "VRA-629",
            f"CANN counts {format_count(facts.cann_devices, 'NPU')}, and none of their files /dev/davinci* is there, "
            "without which none can be opened.",
            "`docker run --device /dev/davinci0`, and so on for each NPU that it is to have.",
        )
    if facts.cann_devices:
        return
    for name in _MANAGERS:
        if name not in node.record.devices:
            yield node.finding(
                "error",
                "VRA-630",
                f"/dev/{name} is not there, without which no NPU can be opened.",
                f"In a container: {_IN_CONTAINER}; on a host, install the driver and reboot.",
                file=name,
            )


def check_device_access(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each reason for which device files cannot be opened."""
    errors: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in node.record.devices.items():
        errors[file.error].append(name)
    if names := errors.pop("EPERM", []):
        yield node.finding(
            "error",
            "VRA-631",
            f"the container's list of devices forbids to open {_paths(names)}.",
            f"Give the container these devices: `{' '.join(f'--device /dev/{name}' for name in names)}`.",
            files=names,
        )
    if names := errors.pop("EACCES", []):
        file, user = node.record.devices[names[0]], node.record.user
        yield node.finding(
            "error",
            "VRA-632",
            f"user {user.uid if user else '?'} (groups {join(user.groups if user else [])}) may not open "
            f"{_paths(names)}, of user {file.uid}, group {file.gid}, mode {file.mode:04o}.",
            "Add the user who runs `ray start` to the group, usually HwHiAiUser: `sudo usermod -aG "
            f"$(getent group {file.gid} | cut -d: -f1) USER`, or `docker run --group-add {file.gid}`; restart Ray.",
            files=names,
        )
    errors.pop("", None)
    for error, names in errors.items():
        yield node.unknown(f"opening {_paths(names)} ends with {error}", "`sudo dmesg` on the host may say why.")


def check_user(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where the user has no name, which CANN and torch ask for."""
    user = node.record.user
    if user is not None and not user.name:
        yield node.finding(
            "warning",
            "VRA-633",
            f"user {user.uid}, who runs Ray, has no entry in /etc/passwd: CANN and torch may find no home folder.",
            f"`echo 'npu:x:{user.uid}:{user.groups[0]}::/tmp:/bin/sh' >> /etc/passwd` in the image.",
        )


def check_npu_smi(node: NodeView) -> Iterator[Finding]:
    """Yield an error where npu-smi runs and lists no NPU: the driver's management interface (DCMI) fails."""
    output = node.record.outputs.get(LIST)
    if node.dies:
        return
    if output is None or output.code is None:
        yield from node.unknown_answers(HEALTH)
        return
    line = next((line.strip() for line in output.text.splitlines() if line.strip()), "")
    yield node.finding(
        "error",
        "VRA-634",
        f"`{LIST}` lists no NPU; it ended with code {output.code}: {line!r}.",
        "-8005 or -8020: another container has the NPUs, or the driver is not loaded: `lsmod | grep drv_`, "
        "`sudo dmesg`.",
        output=output.text[:400],
    )


def check_health(node: NodeView) -> Iterator[Finding]:
    """Yield a finding for each NPU whose health is not OK."""
    for die, health in node.answers(HEALTH).items():
        if health.state.upper() == "OK":
            continue
        yield node.finding(
            "warning" if health.state.upper() in ("WARNING", "UNKNOWN") else "error",
            "VRA-640",
            f"its health is {health.state}{f', with the codes {join(health.codes)}' if health.codes else ''}.",
            f"`npu-smi info -t health -i {die.card} -c {die.chip}` there; look the codes up in the driver's health "
            "management manual, and leave the NPU out of ASCEND_RT_VISIBLE_DEVICES until it is well.",
            die,
            state=health.state,
            codes=list(health.codes),
        )


def check_ecc(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU whose HBM has had errors that could not be corrected."""
    for die, ecc in node.answers(ECC).items():
        if ecc.double_bit or ecc.isolated_pages:
            yield node.finding(
                "warning",
                "VRA-641",
                f"its HBM has had {ecc.double_bit} double-bit errors, {ecc.isolated_pages} pages are isolated.",
                f"`npu-smi info -t ecc -i {die.card} -c {die.chip}` there; have the card replaced where it grows.",
                die,
                double_bit=ecc.double_bit,
                isolated_pages=ecc.isolated_pages,
            )


def check_temperature(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU that is so hot that it slows down."""
    for die, degrees in node.answers(TEMPERATURE).items():
        if degrees >= _HOT_C:
            yield node.finding(
                "warning",
                "VRA-642",
                f"it has {degrees} C, and slows down from about {_HOT_C} C on.",
                f"Look at fans and air flow; `npu-smi info -t temp -i {die.card} -c {die.chip}` there.",
                die,
                celsius=degrees,
            )


def check_strangers(node: NodeView) -> Iterator[Finding]:
    """Yield a finding for each process that has memory of an NPU and is not of this Ray node.

    npu-smi counts processes as the host does: one that this node's /proc does not have is in another container, or in
    this one under another id. Then only an NPU that Ray has given to nobody shows it.
    """
    for die, processes in node.answers(PROCESSES).items():
        for process in processes:
            holder = node.record.holders.get(process.pid)
            if holder and not _is_same_name(holder.name, process.name):
                holder = None  # another process, which has the same id in this container
            if not (severity := _stranger_severity(node, holder)):
                continue
            command = holder.command[:80] if holder else f"{process.name or 'no name'}, not in this node's /proc"
            end = f"end it (`kill {process.pid}`)" if holder else f"find it on the host (`ps -p {process.pid}`), end it"
            yield node.finding(
                severity,
                "VRA-643",
                f"process {process.pid} ({command}) has {process.megabytes} MB of its HBM{_origin(severity, holder)}.",
                f"Unless it is meant to have it, {end}, or leave the NPU out of ASCEND_RT_VISIBLE_DEVICES before "
                "`ray start`.",
                die,
                pid=process.pid,
                megabytes=process.megabytes,
            )


def _stranger_severity(node: NodeView, holder: Holder | None) -> Severity | None:
    """Return how bad it is that a process has an NPU, None where it may have it; ``holder`` is None if it is unseen.

    Without Ray it is a note, since anybody may be at work there, except for what is left of an earlier Ray.
    """
    if holder and holder.of_ray:
        return None
    if holder and holder.leftover:
        return "error"
    if node.ray is None:
        return "info"
    return "error" if holder or node.is_idle else None


def _origin(severity: Severity, holder: Holder | None) -> str:
    if severity == "info":
        return "; without Ray it is not known whose it is"
    return " and is left of an earlier Ray" if holder and holder.leftover else " and is not of this Ray node"


def _is_same_name(kernels: str, tools: str) -> bool:
    """Return whether two names may be of one process. The kernel's has 15 letters, npu-smi's lacks punctuation."""
    first, second = ("".join(filter(str.isalnum, name)) for name in (kernels, tools))
    return first.startswith(second) or second.startswith(first)


def check_hbm(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU with memory in use of no listed process, where Ray has given away no NPU."""
    processes = node.answers(PROCESSES)
    for die, percent in node.answers(HBM).items():
        if node.is_idle and percent > _IDLE_HBM_PERCENT and not processes.get(die):
            yield node.finding(
                "warning",
                "VRA-644",
                f"{percent} % of its HBM are in use, though Ray has given no NPU of the node to anybody and npu-smi "
                "lists no process.",
                f"In a container: on the host `npu-smi info -t proc-mem -i {die.card} -c {die.chip}`; end what it "
                f"shows. On the host: `sudo fuser -v /dev/davinci{die.physical_id}`, other containers; where nobody "
                f"has it, `sudo npu-smi set -t reset -i {die.card} -c {die.chip}`. Until then leave NPU "
                f"{die.physical_id} out of ASCEND_RT_VISIBLE_DEVICES before `ray start`.",
                die,
                percent=percent,
            )


def check_hccs(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each die whose links to the other dies are down."""
    for die, state in node.answers(HCCS).items():
        if state.upper() not in ("OK", "HEALTHY"):
            yield node.finding(
                "error",
                "VRA-645",
                f"its HCCS links are {state}.",
                f"`npu-smi info -t hccs -i {die.card} -c {die.chip}` there; reset the NPU, or have the card replaced.",
                die,
                state=state,
            )


def check_super_pod(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield errors of numbers in the super pod: an SDID is of one die of it, a Server Index of one node.

    Where the tool does not say which super pod it is, a number that two nodes have is a warning: there may be two.
    """
    owners: dict[tuple[int | None, int], tuple[NodeView, Die]] = {}
    for node in nodes:
        answers = node.answers(SUPER_POD)
        for die, pod in answers.items():
            owner, other = owners.setdefault((pod.pod, pod.sdid), (node, die))
            if (owner, other) != (node, die):
                yield node.finding(
                    "warning" if pod.pod is None and owner is not node else "error",
                    "VRA-646",
                    f"its SDID {pod.sdid} is that of NPU {other.physical_id} of node {owner.address} too, in "
                    f"{'the same super pod' if pod.pod is None else f'super pod {pod.pod}'}.",
                    "Correct the server's number in the super pod in its BMC, then reboot.",
                    die,
                    sdid=pod.sdid,
                )
        servers = sorted({pod.server_index for pod in answers.values()})
        if len(servers) > 1:
            yield node.finding(
                "error",
                "VRA-647",
                f"its NPUs report different Server Indexes: {join(servers)}.",
                "Correct the server's number in the super pod in its BMC, then reboot.",
                servers=servers,
            )


def _paths(names: Sequence[str]) -> str:
    return ", ".join(f"/dev/{name}" for name in names)


CHECKS = (
    _audit("npus-declared", "Ray has the NPUs that the node has", "CANN, `ray start`"),
    _audit("plugin", "this plugin is active, and equal on all nodes", "`ray start`, metadata"),
    _audit("visible-devices", "lists of NPUs are read as they are meant", "`ray start`"),
    Check(
        "npu-counts",
        "CANN, device files and npu-smi count alike",
        "CANN, /dev, npu-smi -m",
        lambda node: find_unequal_counts(node.record.facts),
        at_start="refuses",
    ),
    Check(
        "split-cards",
        "Ray has both dies of a card (A3)",
        "`ray start`, npu-smi -m",
        check_split_cards,
        applies=on_a3,
        at_start="warns",
    ),
    Check("device-files", "the driver's device files are there", "/dev", check_device_files),
    Check("device-access", "device files can be opened", "open() of /dev/davinci*", check_device_access),
    Check("user", "the user who runs Ray has a name", "/etc/passwd", check_user, at_start="warns"),
    Check("npu-smi", "npu-smi answers", "npu-smi -m", check_npu_smi),
    Check("health", "each NPU is healthy", "npu-smi -t health", check_health, (HEALTH,)),
    Check("ecc", "HBM without uncorrectable errors", "npu-smi -t ecc", check_ecc, (ECC,)),
    Check("strangers", "no process of others has an NPU", "npu-smi -t proc-mem", check_strangers, (PROCESSES,)),
    Check("hbm", "the HBM of idle NPUs is free", "npu-smi -t usages", check_hbm, (HBM,), of_ray=True),
    Check("temperature", "no NPU is too hot", "npu-smi -t temp", check_temperature, (TEMPERATURE,), "full"),
    Check("hccs", "links between the dies are up (A3)", "npu-smi -t hccs", check_hccs, (HCCS,), "full", applies=on_a3),
    Check(
        "super-pod",
        "numbers in the super pod are unique (A3)",
        "npu-smi -t spod-info",
        check_super_pod,
        (SUPER_POD,),
        "full",
        of_cluster=True,
        applies=on_a3,
    ),
)
