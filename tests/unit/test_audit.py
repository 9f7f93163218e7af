"""The exact text and code of every finding of the audit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_ray_ascend.cluster.audit import Driver, audit_node, raise_for_findings, unreachable_finding
from vllm_ray_ascend.cluster.findings import Finding
from vllm_ray_ascend.cluster.node_facts import NodeFacts
from vllm_ray_ascend.errors import ClusterResourceError

pytestmark = pytest.mark.unit

HEAD = "10.0.0.1:6379"
JOIN = "`ray start --address=10.0.0.1:6379`"
JOIN_WITH_8 = """`ray start --address=10.0.0.1:6379 --resources='{"NPU": 8}'`"""
HEALTHY = NodeFacts("10.0.0.2", "b", cann_devices=8, device_files=tuple(range(8)), npu_smi=8, acl_importable=True)
BLIND = replace(HEALTHY, device_files=(), npu_smi=None, acl_importable=False)
VERSIONS = {"vllm-ray-ascend": "0.1.0", "vllm-ascend": "0.30.0rc2"}
SET_ENV = "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or where CANN is)"


def error(code: str, text: str) -> tuple[str, str, str]:
    return "error", code, text


def warning(code: str, text: str) -> tuple[str, str, str]:
    return "warning", code, text


def found(
    facts: NodeFacts, npus: float = 8, gpus: float = 0, driver: Driver | None = None
) -> list[tuple[str, str, str]]:
    return [
        (each.severity, each.code, f"{each.text} {each.remedy}") for each in audit_node(facts, npus, gpus, HEAD, driver)
    ]


@pytest.mark.parametrize(
    ("facts", "npus", "gpus"),
    [
        pytest.param(HEALTHY, 8, 0, id="as declared to Ray"),
        pytest.param(replace(HEALTHY, visible_devices="4,5"), 2, 0, id="a list, and as many"),
        pytest.param(BLIND, 8, 0, id="declared, although Ray detects none"),
        pytest.param(NodeFacts("10.0.0.1", "a", cann_error="OSError: libascendcl.so"), 0, 0, id="head without NPUs"),
        pytest.param(NodeFacts("10.0.0.3", "c", cann_devices=0), 0, 8, id="real GPUs"),
        pytest.param(replace(HEALTHY, visible_devices=""), 0, 0, id="hidden on purpose"),
        pytest.param(replace(HEALTHY, noset="1"), 8, 0, id="NOSET 1"),
        pytest.param(replace(HEALTHY, noset="True"), 8, 0, id="NOSET true"),
        pytest.param(replace(HEALTHY, noset="0"), 8, 0, id="NOSET off"),
        pytest.param(replace(HEALTHY, cann_devices=4, device_files=(4, 5, 6, 7), npu_smi=4), 4, 0, id="container"),
        pytest.param(replace(HEALTHY, switches={"VLLM_PLUGINS": "ascend,ray_ascend"}), 8, 0, id="plugins with ours"),
    ],
)
def test_nothing_is_wrong(facts: NodeFacts, npus: float, gpus: float) -> None:
    assert found(facts, npus, gpus) == []


def test_gpus_declared_for_npus() -> None:
    assert found(HEALTHY, npus=0, gpus=8) == [
        error(
            "VRA-201",
            "it declares 8 GPUs and none of its 8 NPUs to Ray: with --num-gpus Ray may or may not detect "
            f"NPUs. `ray stop` there, then {JOIN}, without --num-gpus.",
        )
    ]


def test_gpus_declared_where_ray_detects_no_npus() -> None:
    ((_, _, text),) = found(BLIND, npus=0, gpus=8)
    assert text.endswith(f"`ray stop` there, then {JOIN_WITH_8}, without --num-gpus.")


def test_none_declared() -> None:
    assert found(HEALTHY, npus=0) == [
        error("VRA-202", f"it declares none of its 8 NPUs to Ray. `ray stop` there, then {JOIN_WITH_8}.")
    ]


def test_none_declared_because_ray_detects_none() -> None:
    assert found(BLIND, npus=0) == [
        error(
            "VRA-202",
            "it declares none of its 8 NPUs to Ray: Ray can neither import CANN's Python module `acl` there nor find "
            f"/dev/davinci*. `ray stop` there, then {JOIN_WITH_8}.",
        )
    ]


def test_none_declared_and_no_cann() -> None:
    facts = replace(HEALTHY, cann_devices=None, cann_error="OSError: libascendcl.so", acl_importable=False)
    assert found(facts, npus=0) == [
        error(
            "VRA-202",
            f"it declares none of its 8 NPUs to Ray. `ray stop` there, then {SET_ENV}, then {JOIN_WITH_8}.",
        )
    ]


def test_declared_but_no_cann() -> None:
    facts = replace(HEALTHY, cann_devices=None, cann_error="OSError: libascendcl.so", acl_importable=False)
    assert found(facts) == [
        error(
            "VRA-203",
            "it declares 8 NPUs to Ray, but CANN counts none (OSError: libascendcl.so): workers inherit the "
            f"environment of `ray start`. `ray stop` there, then {SET_ENV}, then {JOIN}.",
        )
    ]


def test_more_declared_than_the_list_leaves() -> None:
    assert found(replace(HEALTHY, visible_devices="0,1")) == [
        error(
            "VRA-205",
            "it declares 8 NPUs to Ray, but 2 of 8 are usable: ASCEND_RT_VISIBLE_DEVICES=0,1 names no more. "
            f"`ray stop` there, then {JOIN}, without NPU in --resources.",
        )
    ]


def test_more_declared_than_there_are() -> None:
    assert found(replace(HEALTHY, device_files=(), npu_smi=None), npus=16) == [
        error(
            "VRA-206",
            "it declares 16 NPUs to Ray, but 8 of 8 are usable: CANN counts no more. "
            f"`ray stop` there, then {JOIN}, without NPU in --resources.",
        )
    ]


def test_more_declared_where_ray_detects_none() -> None:
    ((_, _, text),) = found(BLIND, npus=16)
    assert text.endswith(f"CANN counts no more. `ray stop` there, then {JOIN_WITH_8}.")


def test_a_list_with_an_npu_that_does_not_exist() -> None:
    assert found(replace(HEALTHY, visible_devices="6,7,8,9", acl_importable=False), npus=4) == [
        error(
            "VRA-204",
            "it declares 4 NPUs to Ray, but 2 of 8 are usable: ASCEND_RT_VISIBLE_DEVICES=6,7,8,9 names NPU '8', which "
            "does not exist. `ray stop` there, then `unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to "
            f"7), then {JOIN}.",
        )
    ]


def test_a_list_of_device_files_in_a_container() -> None:
    facts = replace(HEALTHY, cann_devices=4, device_files=(4, 5, 6, 7), npu_smi=4, visible_devices="4,5,6,7")
    assert found(facts, npus=0) == [
        error(
            "VRA-204",
            "it declares 0 NPUs to Ray, but 0 of 4 are usable: ASCEND_RT_VISIBLE_DEVICES=4,5,6,7 names NPU '4', which "
            "does not exist. CANN numbers /dev/davinci4 to 7 from 0. `ray stop` there, then "
            f"`unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to 3), then {JOIN}.",
        )
    ]


def test_a_list_that_is_cut_short_where_as_many_are_declared() -> None:
    assert found(replace(BLIND, visible_devices="6,7,8"), npus=2) == [
        warning(
            "VRA-209",
            "ASCEND_RT_VISIBLE_DEVICES=6,7,8 names NPU '8', which does not exist: 2 of 8 NPUs are usable. `ray stop` "
            "there, then `unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to 7), "
            f"then {JOIN_WITH_8}.",
        )
    ]


def test_a_list_that_newer_cann_rejects() -> None:
    assert found(replace(HEALTHY, visible_devices="5,4"), npus=2) == [
        warning(
            "VRA-210",
            "ASCEND_RT_VISIBLE_DEVICES='5,4' does not name its NPUs in ascending order, each once: CANN since 8.0 then "
            "lets the process see no NPU. `ray stop` there, then `export ASCEND_RT_VISIBLE_DEVICES=4,5`, "
            f"then {JOIN}.",
        )
    ]


def test_fewer_declared_than_there_are() -> None:
    assert found(HEALTHY, npus=4) == [
        warning(
            "VRA-211",
            "it declares 4 of its 8 NPUs to Ray: the others stay idle. To use them: "
            f"`ray stop` there, then {JOIN}, without NPU in --resources.",
        )
    ]


def test_noset_that_ray_reads_as_false() -> None:
    assert found(replace(HEALTHY, noset="0,1,2")) == [
        warning(
            "VRA-212",
            "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES=0,1,2 counts as false since Ray 2.54, "
            "which accepts only 1 and true. "
            "Workers of engines get 1 all the same. For others: `ray stop` there, then "
            f"`export RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES=1`, then {JOIN}.",
        )
    ]


@pytest.mark.parametrize(
    ("facts", "other"),
    [
        (replace(HEALTHY, cann_devices=4, npu_smi=None), "/dev/davinci* are 8"),
        (replace(HEALTHY, cann_devices=4, device_files=(4, 5, 6, 7)), "`npu-smi info -m` lists 8"),
    ],
)
def test_counts_that_disagree(facts: NodeFacts, other: str) -> None:
    assert found(facts, npus=4) == [
        warning(
            "VRA-213",
            f"CANN counts 4 NPUs, but {other}. In a container with some of the node's NPUs this is expected, and "
            "ASCEND_RT_VISIBLE_DEVICES there takes CANN's numbers, from 0. Elsewhere `npu-smi info` shows which NPU is "
            "unhealthy.",
        )
    ]


def test_switched_off_there() -> None:
    facts = replace(HEALTHY, switches={"VLLM_RAY_ASCEND": "0", "VLLM_PLUGINS": "ascend"})
    assert found(facts) == [
        error(
            "VRA-207",
            "VLLM_RAY_ASCEND=0 is set there, which turns vllm-ray-ascend off. "
            f"`ray stop` there, then `unset VLLM_RAY_ASCEND`, then {JOIN}.",
        ),
        error(
            "VRA-208",
            "VLLM_PLUGINS=ascend there excludes vllm-ray-ascend. "
            f"`ray stop` there, then `export VLLM_PLUGINS=ascend,ray_ascend`, then {JOIN}.",
        ),
    ]


def test_switches_of_the_driver_win() -> None:
    facts = replace(HEALTHY, switches={"VLLM_RAY_ASCEND": "0", "VLLM_PLUGINS": "ascend"})
    assert found(facts, driver=Driver(switches={"VLLM_RAY_ASCEND", "VLLM_PLUGINS"})) == []


def test_versions_that_differ_from_the_drivers() -> None:
    facts = replace(HEALTHY, versions={"vllm-ray-ascend": "0.0.9"})
    assert found(facts, driver=Driver(VERSIONS)) == [
        warning(
            "VRA-214",
            "vllm-ray-ascend 0.0.9 there, 0.1.0 on the driver's node. `pip install vllm-ray-ascend==0.1.0` there.",
        ),
        warning(
            "VRA-214",
            "vllm-ascend is missing there, 0.30.0rc2 on the driver's node. `pip install vllm-ascend==0.30.0rc2` there.",
        ),
    ]
    assert found(replace(HEALTHY, versions=VERSIONS), driver=Driver(VERSIONS)) == []


def test_the_head_is_restarted_as_head() -> None:
    ((_, _, text),) = found(replace(HEALTHY, address="10.0.0.1"), npus=0)
    assert text.endswith(
        """`ray stop` there, then `ray start --head --port=6379 --resources='{"NPU": 8}'` """
        "(this is the head: join the other nodes again after it)."
    )


MISSING = "ModuleNotFoundError: No module named 'vllm_ray_ascend'"


@pytest.mark.parametrize(("npus", "severity"), [(8, "error"), (0, "warning")])
def test_a_node_without_our_package(npus: float, severity: str) -> None:
    finding = unreachable_finding("10.0.0.2", npus, MISSING, "0.1.0")
    assert finding.severity == severity
    assert str(finding) == (
        f"VRA-215: node 10.0.0.2: vllm-ray-ascend 0.1.0 is not installed there ({MISSING}). "
        "`pip install vllm-ray-ascend==0.1.0` there."
    )


def test_a_node_that_does_not_answer() -> None:
    assert unreachable_finding("10.0.0.2", 8, "no answer within 20 s", "0.1.0") == Finding(
        "10.0.0.2",
        "warning",
        "VRA-216",
        "its NPUs could not be checked: no answer within 20 s.",
        "See `ray status`, and raylet.out in Ray's log folder there.",
        check="answer",
    )


def test_every_error_is_raised_and_warnings_are_returned() -> None:
    first, second = Finding("10.0.0.1", "error", "VRA-201", "a. b."), Finding("10.0.0.2", "error", "VRA-202", "c. d.")
    other = Finding("10.0.0.2", "warning", "VRA-209", "e.")
    with pytest.raises(ClusterResourceError) as raised:
        raise_for_findings([first, other, second])
    assert str(raised.value) == (
        "VRA-217: The engine cannot start on these nodes:\nVRA-201: node 10.0.0.1: a. b.\nVRA-202: node 10.0.0.2: c. d."
    )
    assert raise_for_findings([other]) == [other]
