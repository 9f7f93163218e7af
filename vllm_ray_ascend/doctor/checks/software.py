"""Versions: driver, firmware, CANN, Python packages, on each node and between nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from packaging.version import InvalidVersion, Version

from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.doctor import parsers
from vllm_ray_ascend.doctor.queries import BOARD, SERVE_LLM
from vllm_ray_ascend.doctor.views import Check, NodeView, odd_ones

_SET_ENV = "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or where CANN is) before `ray start` there."
_MOUNT_FIRMWARE = "In a container: `-v /usr/local/Ascend/firmware:/usr/local/Ascend/firmware:ro`."
_MOUNT_DRIVER = "In a container, mount /usr/local/Ascend/driver; or set ASCEND_DRIVER_PATH to where the driver is."


def check_driver(node: NodeView) -> Iterator[Finding]:
    """Yield a finding where no driver is installed."""
    if node.properties("driver").get("Version"):
        return
    if node.record.facts.cann_devices:
        yield node.unknown("the driver works, but its version.info is not there", _MOUNT_DRIVER)
    else:
        yield node.finding(
            "error",
            "VRA-610",
            "no driver is there: its version.info cannot be read, and CANN counts no NPU.",
            f"Install the driver (Ascend-hdk-*-npu-driver), then reboot. {_MOUNT_DRIVER}",
        )


def check_firmware(node: NodeView) -> Iterator[Finding]:
    """Yield a finding where the firmware is outside the range for which the driver was made."""
    driver, firmware = node.properties("driver"), node.properties("firmware").get("Version", "")
    ranges = parsers.parse_ranges(driver.get("compatible_version_fw", ""))
    if not ranges:
        yield node.unknown("the driver's version.info is not there, or names no compatible_version_fw", _MOUNT_DRIVER)
    elif not firmware and not node.answers(BOARD):  # what the NPUs say themselves is another check
        yield node.unknown("the firmware's version.info is not there", _MOUNT_FIRMWARE)
    elif firmware and not parsers.is_in_ranges(firmware, ranges):
        yield node.finding(
            "error",
            "VRA-611",
            f"firmware {firmware} does not fit driver {driver.get('Version')}, which takes "
            f"{driver['compatible_version_fw']}.",
            "Install the firmware (Ascend-hdk-*-npu-firmware) of the driver's release, then reboot.",
            firmware=firmware,
            driver=driver.get("Version"),
        )


def check_compatibility(node: NodeView) -> Iterator[Finding]:
    """Yield a finding for each NPU that itself says that driver and firmware do not fit."""
    for die, value in node.answers(BOARD).items():
        if value.upper() == "NOK":
            yield node.finding(
                "error",
                "VRA-612",
                "the NPU reports that its driver and its firmware are not compatible.",
                f"`npu-smi info -t board -i {die.card}` there shows both; install those of one release.",
                die,
            )
        elif value.upper() != "OK":
            yield node.unknown(f"{BOARD.title} says {value!r}", "Install the firmware again.", [die])


def check_cann(node: NodeView) -> Iterator[Finding]:
    """Yield a finding where CANN is not found."""
    if node.properties("cann"):
        return
    if node.record.facts.cann_devices is not None:
        yield node.unknown("CANN works, but its install.info is not below ASCEND_HOME_PATH", _SET_ENV)
    else:
        yield node.finding(
            "error",
            "VRA-613",
            f"CANN is not found, neither at ASCEND_HOME_PATH={node.record.environment.get('ASCEND_HOME_PATH', '')} "
            f"nor below /usr/local/Ascend ({node.record.facts.cann_error}).",
            f"Install CANN's toolkit, or {_SET_ENV}",
        )


def check_driver_fits_cann(node: NodeView) -> Iterator[Finding]:
    """Yield a finding where neither CANN lists the driver's release, nor the driver that of CANN.

    A driver is newer than all that its CANN could list wherever it was updated alone, which is usual: a note.
    """
    driver, cann = node.properties("driver"), node.properties("cann")
    release, own = (
        parsers.inner_release(each.get(key, "")) for each, key in ((driver, "Innerversion"), (cann, "innerversion"))
    )
    listed = _releases(cann.get("compatible_version", ""))
    if not release:
        yield node.unknown("the driver's Innerversion cannot be read", _MOUNT_DRIVER)
    elif not listed:
        yield node.unknown(
            "no install.info of CANN has its compatible_version", f"Install CANN's toolkit, or {_SET_ENV}"
        )
    elif release not in {*listed, own} and own not in _releases(driver.get("compatible_version", "")):
        numbers = [_number(each) for each in listed]
        is_newer, is_older = _number(release) > max(numbers), _number(release) < min(numbers)
        relation = "newer than" if is_newer else "older than" if is_older else "not among"
        yield node.finding(
            "info" if is_newer else "warning",
            "VRA-614",
            f"driver {driver.get('Version')} ({release}) is {relation} the releases that CANN {cann.get('version')} "
            f"lists: {cann['compatible_version']}.",
            "It usually works; CANN's release notes name the drivers that were tested with it."
            if is_newer
            else _INSTALL_DRIVER.format("of CANN's release notes"),
            driver=release,
        )


def _releases(listed: str) -> set[str]:
    """Return the inner releases of a list such as `[V100R001C23],[V100R001C25]`."""
    return {release for entry in listed.split(",") if (release := parsers.inner_release(entry.strip(" []")))}


_INSTALL_DRIVER = "Stop Ray there, install the driver and the firmware {}, reboot, `ray start`."


def _number(release: str) -> tuple[int, ...]:
    """Return the numbers of a release such as V100R001C23, by which releases are in order."""
    return tuple(map(int, re.findall(r"\d+", release)))


def check_nnal(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where ATB is not installed, whose operators vllm-ascend uses."""
    if not node.record.nnal and not node.record.environment.get("ATB_HOME_PATH"):
        yield node.finding(
            "warning",
            "VRA-615",
            "NNAL (ATB) is not there, whose operators vllm-ascend uses.",
            "Install Ascend-cann-nnal, and `source /usr/local/Ascend/nnal/atb/set_env.sh` before `ray start` there.",
        )


def check_same_driver(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a warning for each node with another driver than most."""
    found = {node: version for node in nodes if (version := node.properties("driver").get("Version"))}
    for node, version, example, usual in odd_ones(found):
        yield node.finding(
            "warning",
            "VRA-616",
            f"driver {version} there, {usual} on node {example.address}.",
            _INSTALL_DRIVER.format(usual),
            here=version,
            there=usual,
        )


def check_same_cann(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each node with another CANN than most: ranks that differ hang, or fail in HCCL."""
    found = {node: version for node in nodes if (version := node.cann_version)}
    for node, version, example, usual in odd_ones(found):
        yield node.finding(
            "error",
            "VRA-617",
            f"CANN {version} there ({node.record.cann_home}), {usual} on node {example.address}.",
            f"Install CANN {usual} there, or set ASCEND_HOME_PATH to it, then restart Ray.",
            here=version,
            there=usual,
        )


_EQUAL = ("Python", "ray", "vllm", "torch", "torch-npu")


def check_same_packages(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each node with another Python, Ray, vLLM or torch; the audit compares ours and vllm-ascend."""
    for package in _EQUAL:
        found = {node: _compared(package, node.record.versions.get(package)) for node in nodes}
        for node, version, example, usual in odd_ones(found):
            yield node.finding(
                "error",
                "VRA-618",
                f"{package} {version or 'is missing'} there, {usual or 'not installed'} on node {example.address}.",
                f"{_install(package, usual)} there." if package != "Python" and usual else f"Use one {package}.",
                package=package,
                here=version,
                there=usual,
            )


def _install(package: str, version: str) -> str:
    """Return the command that installs a release. Builds for CPU or NPUs (0.30.0+empty) are not where pip looks."""
    public, _, build = version.partition("+")
    if package == "vllm":
        return f"`VLLM_TARGET_DEVICE=empty pip install --no-deps --force-reinstall --no-binary vllm vllm=={public}`"
    if build and package == "torch":
        return f"`pip install torch=={version} --index-url https://download.pytorch.org/whl/{build}`"
    return f"`pip install {package}=={version}`"


def _compared(package: str, version: str | None) -> str | None:
    """Return what has to be equal of a version: of Python, as for Ray, all but the last number."""
    return version.rpartition(".")[0] if version and package == "Python" else version


def check_set(node: NodeView) -> Iterator[Finding]:
    """Yield an error where vllm-ascend was not made for this vLLM or torch, or torch_npu not for this torch."""
    versions = node.record.versions
    for package, base, parts in (("vllm-ascend", "vllm", 2), ("torch-npu", "torch", 3)):
        mine, theirs = _release(versions.get(package), parts), _release(versions.get(base), parts)
        if mine and theirs and mine != theirs:
            series = ".".join(map(str, theirs))
            yield _not_made_for(
                node,
                package,
                base,
                f"Install releases of one set: `pip install --pre '{package}=={series}.*'`, or the {base} that "
                f"{package} {versions.get(package)} asks for.",
            )
    for base, pin in node.record.pins.items():
        wanted, theirs = _release(pin, 3), _release(versions.get(base), 3)
        if wanted and theirs and wanted != theirs:
            yield _not_made_for(node, "vllm-ascend", base, f"{_install(base, pin)} there, which it requires.")


def _not_made_for(node: NodeView, package: str, base: str, remedy: str) -> Finding:
    versions = node.record.versions
    return node.finding(
        "error",
        "VRA-619",
        f"{package} {versions.get(package)} is not made for {base} {versions.get(base)}.",
        remedy,
        versions={package: versions.get(package), base: versions.get(base)},
    )


def check_cuda_packages(node: NodeView) -> Iterator[Finding]:
    """Yield an error where vLLM is the build for CUDA, as `pip install ray[llm]` brings it."""
    if node.record.cuda_packages:
        yield node.finding(
            "error",
            "VRA-620",
            f"vLLM {node.record.versions.get('vllm')} there is the build for CUDA: it requires "
            f"{', '.join(node.record.cuda_packages[:3])}. `pip install ray[llm]` replaces vLLM by it.",
            f"{_install('vllm', node.record.versions.get('vllm') or '')} there, then vllm-ascend again.",
            packages=node.record.cuda_packages,
        )


def check_serve_llm(node: NodeView) -> Iterator[Finding]:
    """Yield a note where Ray Serve LLM cannot be imported with this vLLM: whatever else there is works."""
    if missing := node.record.serve_llm_lacks:
        ray, vllm = (node.record.versions.get(package) for package in ("ray", "vllm"))
        yield node.finding(
            "info",
            "VRA-621",
            f"Ray Serve LLM of Ray {ray} is for another vLLM than {vllm}, which has no {missing[0]}.",
            "Needed for Ray Serve LLM alone: install a pair of `docs/ray-serve-llm.md`, Releases of Ray.",
            missing=missing,
        )


def _release(version: str | None, parts: int) -> tuple[int, ...]:
    """Return the release without suffixes: that of 0.30.0rc2 is that of 0.30.0. Builds between releases have none."""
    try:
        parsed = Version(version or "")
    except InvalidVersion:  # missing, or a private build
        return ()
    return () if parsed.is_devrelease else parsed.release[:parts]


CHECKS = (
    Check("driver", "an NPU driver is installed", "driver/version.info", check_driver),
    Check("firmware", "the firmware fits the driver", "compatible_version_fw in driver/version.info", check_firmware),
    Check("board", "driver and firmware fit, as the NPU says", "npu-smi -t board", check_compatibility, (BOARD,)),
    Check("cann", "CANN is found", "ASCEND_HOME_PATH, /usr/local/Ascend", check_cann),
    Check("driver-cann", "the driver fits CANN", "Innerversion, CANN's compatible_version", check_driver_fits_cann),
    Check("nnal", "NNAL (ATB) is installed", "nnal/atb/*/version.info, ATB_HOME_PATH", check_nnal),
    Check(
        "same-driver",
        "one driver on all nodes",
        "driver/version.info",
        check_same_driver,
        of_cluster=True,
        at_start="warns",
    ),
    Check(
        "same-cann",
        "one CANN on all nodes",
        "ascend_toolkit_install.info",
        check_same_cann,
        of_cluster=True,
        at_start="warns",
    ),
    Check(
        "same-packages",
        "one Python, Ray, vLLM, torch and torch_npu on all nodes with NPUs",
        "metadata of packages",
        check_same_packages,
        of_cluster=True,
        at_start="warns",
    ),
    Check(
        "package-set",
        "vllm-ascend fits vLLM and torch, torch_npu fits torch",
        "metadata of packages",
        check_set,
        at_start="warns",
    ),
    Check(
        "cuda-packages",
        "vLLM is not the build for CUDA",
        "what vLLM's metadata requires",
        check_cuda_packages,
        at_start="warns",
    ),
    Check(
        "serve-llm",
        "Ray Serve LLM is made for this vLLM",
        "what it imports of vLLM",
        check_serve_llm,
        also=(SERVE_LLM,),
    ),
)
