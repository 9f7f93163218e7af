"""Every finding of the audit, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_ray_ascend.cluster.audit import Driver, Finding, findings, refuse, unreachable
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


def error(text: str) -> tuple[str, str]:
    return "error", text


def warning(text: str) -> tuple[str, str]:
    return "warning", text


def found(facts: NodeFacts, npus: float = 8, gpus: float = 0, driver: Driver | None = None) -> list[tuple[str, str]]:
    return [(each.severity, each.text) for each in findings(facts, npus, gpus, HEAD, driver)]


@pytest.mark.parametrize(
    ("facts", "npus", "gpus"),
    [
        pytest.param(HEALTHY, 8, 0, id="as Ray was told"),
        pytest.param(replace(HEALTHY, visible="4,5"), 2, 0, id="a list, and as many"),
        pytest.param(BLIND, 8, 0, id="a number that Ray could not count"),
        pytest.param(NodeFacts("10.0.0.1", "a", cann_error="OSError: libascendcl.so"), 0, 0, id="head of CPUs"),
        pytest.param(NodeFacts("10.0.0.3", "c", cann_devices=0), 0, 8, id="real GPUs"),
        pytest.param(replace(HEALTHY, visible=""), 0, 0, id="hidden on purpose"),
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
            "Ray was told of 8 GPUs and of none of its 8 NPUs: with --num-gpus it is chance whether Ray looks for "
            f"NPUs. `ray stop` there, then {JOIN}, without --num-gpus.",
        )
    ]


def test_gpus_declared_where_ray_cannot_count_npus() -> None:
    ((_, text),) = found(BLIND, npus=0, gpus=8)
    assert text.endswith(f"`ray stop` there, then {JOIN_WITH_8}, without --num-gpus.")


def test_none_declared() -> None:
    assert found(HEALTHY, npus=0) == [
        error(f"Ray was told of none of its 8 NPUs. `ray stop` there, then {JOIN_WITH_8}.")
    ]


def test_none_declared_because_ray_cannot_count() -> None:
    assert found(BLIND, npus=0) == [
        error(
            "Ray was told of none of its 8 NPUs: it can neither import CANN's Python module `acl` there nor find "
            f"/dev/davinci*. `ray stop` there, then {JOIN_WITH_8}.",
        )
    ]


def test_none_declared_and_no_cann() -> None:
    facts = replace(HEALTHY, cann_devices=None, cann_error="OSError: libascendcl.so", acl_importable=False)
    assert found(facts, npus=0) == [
        error(f"Ray was told of none of its 8 NPUs. `ray stop` there, then {SET_ENV}, then {JOIN_WITH_8}.")
    ]


def test_declared_but_no_cann() -> None:
    facts = replace(HEALTHY, cann_devices=None, cann_error="OSError: libascendcl.so", acl_importable=False)
    assert found(facts) == [
        error(
            "Ray was told of 8 NPUs, but CANN counts none (OSError: libascendcl.so): workers have the environment of "
            f"`ray start`. `ray stop` there, then {SET_ENV}, then {JOIN}.",
        )
    ]


def test_more_declared_than_the_list_leaves() -> None:
    assert found(replace(HEALTHY, visible="0,1")) == [
        error(
            "Ray was told of 8 NPUs, but 2 of 8 can be used: ASCEND_RT_VISIBLE_DEVICES=0,1 leaves no more. "
            f"`ray stop` there, then {JOIN}, without a number of NPUs.",
        )
    ]


def test_more_declared_than_there_are() -> None:
    assert found(replace(HEALTHY, device_files=(), npu_smi=None), npus=16) == [
        error(
            "Ray was told of 16 NPUs, but 8 of 8 can be used: CANN counts no more. "
            f"`ray stop` there, then {JOIN}, without a number of NPUs.",
        )
    ]


def test_more_declared_where_ray_cannot_count() -> None:
    ((_, text),) = found(BLIND, npus=16)
    assert text.endswith(f"CANN counts no more. `ray stop` there, then {JOIN_WITH_8}.")


def test_a_list_with_an_npu_that_is_not_there() -> None:
    assert found(replace(HEALTHY, visible="6,7,8,9", acl_importable=False), npus=4) == [
        error(
            "Ray was told of 4 NPUs, but 2 of 8 can be used: ASCEND_RT_VISIBLE_DEVICES=6,7,8,9 names NPU '8', which is "
            "not there. `ray stop` there, then `unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to 7), "
            f"then {JOIN}.",
        )
    ]


def test_a_list_of_device_files_in_a_container() -> None:
    facts = replace(HEALTHY, cann_devices=4, device_files=(4, 5, 6, 7), npu_smi=4, visible="4,5,6,7")
    assert found(facts, npus=0) == [
        error(
            "Ray was told of 0 NPUs, but 0 of 4 can be used: ASCEND_RT_VISIBLE_DEVICES=4,5,6,7 names NPU '4', which is "
            "not there. CANN numbers /dev/davinci4 to 7 from 0 on. `ray stop` there, then "
            f"`unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to 3), then {JOIN}.",
        )
    ]


def test_a_list_that_stops_early_where_ray_was_told_of_the_rest() -> None:
    assert found(replace(BLIND, visible="6,7,8"), npus=2) == [
        warning(
            "ASCEND_RT_VISIBLE_DEVICES=6,7,8 names NPU '8', which is not there: 2 of 8 NPUs can be used. `ray stop` "
            "there, then `unset ASCEND_RT_VISIBLE_DEVICES` (or set it to numbers from 0 to 7), "
            f"then {JOIN_WITH_8}.",
        )
    ]


def test_a_list_that_newer_cann_refuses() -> None:
    assert found(replace(HEALTHY, visible="5,4"), npus=2) == [
        warning(
            "ASCEND_RT_VISIBLE_DEVICES='5,4' does not name its NPUs in ascending order, each once: CANN since 8.0 then "
            "lets the process see no NPU. `ray stop` there, then `export ASCEND_RT_VISIBLE_DEVICES=4,5`, "
            f"then {JOIN}.",
        )
    ]


def test_fewer_declared_than_there_are() -> None:
    assert found(HEALTHY, npus=4) == [
        warning(
            "Ray was told of 4 of its 8 NPUs: the others lie idle. To use them: "
            f"`ray stop` there, then {JOIN}, without a number of NPUs.",
        )
    ]


def test_noset_that_ray_reads_as_false() -> None:
    assert found(replace(HEALTHY, noset="0,1,2")) == [
        warning(
            "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES=0,1,2 counts as false since Ray 2.54, "
            "which takes only 1 and true. "
            "Workers of this engine have 1 all the same; for others: `ray stop` there, then "
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
            f"CANN counts 4 NPUs, but {other}. In a container with some of the node's NPUs this is right, and "
            "ASCEND_RT_VISIBLE_DEVICES there has CANN's numbers, from 0 on; elsewhere `npu-smi info` shows which is "
            "unwell.",
        )
    ]


def test_switched_off_there() -> None:
    facts = replace(HEALTHY, switches={"VLLM_RAY_ASCEND": "0", "VLLM_PLUGINS": "ascend"})
    assert found(facts) == [
        error(
            "VLLM_RAY_ASCEND=0 is set there, which turns vllm-ray-ascend off. "
            f"`ray stop` there, then `unset VLLM_RAY_ASCEND`, then {JOIN}.",
        ),
        error(
            "VLLM_PLUGINS=ascend there leaves vllm-ray-ascend out. "
            f"`ray stop` there, then `export VLLM_PLUGINS=ascend,ray_ascend`, then {JOIN}.",
        ),
    ]


def test_switches_of_the_driver_win() -> None:
    facts = replace(HEALTHY, switches={"VLLM_RAY_ASCEND": "0", "VLLM_PLUGINS": "ascend"})
    assert found(facts, driver=Driver(switches={"VLLM_RAY_ASCEND", "VLLM_PLUGINS"})) == []


def test_other_versions_than_the_drivers() -> None:
    facts = replace(HEALTHY, versions={"vllm-ray-ascend": "0.0.9"})
    assert found(facts, driver=Driver(VERSIONS)) == [
        warning(
            "vllm-ray-ascend 0.0.9 there, 0.1.0 on the driver's node. `pip install vllm-ray-ascend==0.1.0` there.",
        ),
        warning(
            "vllm-ascend is missing there, 0.30.0rc2 on the driver's node. `pip install vllm-ascend==0.30.0rc2` there.",
        ),
    ]
    assert found(replace(HEALTHY, versions=VERSIONS), driver=Driver(VERSIONS)) == []


def test_the_head_is_started_as_head() -> None:
    ((_, text),) = found(replace(HEALTHY, address="10.0.0.1"), npus=0)
    assert text.endswith(
        """`ray stop` there, then `ray start --head --port=6379 --resources='{"NPU": 8}'` """
        "(this is the head: join the other nodes again after it)."
    )


MISSING = "ModuleNotFoundError: No module named 'vllm_ray_ascend'"


@pytest.mark.parametrize(("npus", "severity"), [(8, "error"), (0, "warning")])
def test_a_node_without_our_package(npus: float, severity: str) -> None:
    finding = unreachable("10.0.0.2", npus, MISSING, "0.1.0")
    assert finding.severity == severity
    assert str(finding) == (
        f"node 10.0.0.2: vllm-ray-ascend 0.1.0 is not installed there ({MISSING}). "
        "`pip install vllm-ray-ascend==0.1.0` there."
    )


def test_a_node_that_does_not_answer() -> None:
    assert unreachable("10.0.0.2", 8, "no answer within 20 s", "0.1.0") == Finding(
        "10.0.0.2",
        "warning",
        "its NPUs could not be checked: no answer within 20 s. `ray status` and raylet.out in Ray's log folder there "
        "say more.",
    )


def test_refusal_names_every_error_and_warnings_are_kept() -> None:
    first, second = Finding("10.0.0.1", "error", "a. b."), Finding("10.0.0.2", "error", "c. d.")
    other = Finding("10.0.0.2", "warning", "e.")
    with pytest.raises(ClusterResourceError) as raised:
        refuse([first, other, second])
    assert str(raised.value) == "node 10.0.0.1: a. b.\nnode 10.0.0.2: c. d."
    assert refuse([other]) == [other]
