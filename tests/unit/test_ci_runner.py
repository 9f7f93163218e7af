"""What the tools of NPUs and GPUs write is read as it was seen on real machines."""

from __future__ import annotations

import pytest

from ci.runner import Device, Runner, detect, generation_of, read_npu_smi, read_nvidia_smi, read_version, runner_of

# Tables as they stand in reports of vLLM's collect_env from Atlas machines, cut to two cards.
A2 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B2               | OK            | 135.9       39                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          33126/ 65536         |
+===========================+===============+====================================================+
| 1     910B2               | Alarm         | 103.8       37                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          32639/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 19334         | VLLMWorker_TP            | 58472                   |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""
A3 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.1                   Version: 25.5.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 4     Ascend910           | OK            | 170.7       49                0    / 0             |
| 0     8                   | 0000:8D:00.0  | 0           0    / 0          51255/ 65536         |
+------------------------------------------------------------------------------------------------+
| 4     Ascend910           | OK            | -           51                0    / 0             |
| 1     9                   | 0000:8F:00.0  | 0           0    / 0          45292/ 65536         |
+===========================+===============+====================================================+
"""
NVIDIA = "0, NVIDIA H200, 570.86.15, 143771\n1, NVIDIA H200, 570.86.15, 143771\n"
CANN = """\
package_name=Ascend-cann-toolkit
version=8.3.RC2
innerversion=V100R001C23SPC002B210
compatible_version=[V100R001C15],[V100R001C18]
arch=aarch64
os=linux
path=/usr/local/Ascend/ascend-toolkit/8.3.RC2/aarch64-linux
"""


def test_cards_of_one_die() -> None:
    assert read_npu_smi(A2) == ("25.2.0", [Device("910B2"), Device("910B2", healthy=False)])


def test_cards_of_two_dies() -> None:
    assert read_npu_smi(A3) == ("25.5.1", [Device("Ascend910"), Device("Ascend910")])


@pytest.mark.parametrize(
    "text",
    ["", "dcmi module initialize failed. ret is -8005\n", A2[: A2.index("| 0 ")], A2[A2.index("| NPU     Chip") :]],
)
def test_no_table_no_npus(text: str) -> None:
    assert read_npu_smi(text)[1] == []


def test_gpus() -> None:
    assert read_nvidia_smi(NVIDIA) == ("570.86.15", [Device("NVIDIA H200")] * 2)
    assert read_nvidia_smi("No devices were found\n") == ("", [])


def test_versions() -> None:
    assert read_version(CANN) == "8.3.RC2"
    assert read_version("Version=25.2.0\nascendhal_version=7.35.23\n") == "25.2.0"
    assert read_version("nothing of that kind") == ""


@pytest.mark.parametrize(
    ("names", "text", "generation"),
    [
        (["910B4", "910B4"], "", "A2"),
        (["Ascend910"], A3, "A3"),
        (["Ascend910"], A2, ""),  # the first 910: Atlas 800, which vllm-ascend does not know
        (["910C"], "", "A3"),
        (["310P3"], "", "310P"),
        (["910B4", "310P3"], "", ""),
        ([], A3, ""),
    ],
)
def test_generations(names: list[str], text: str, generation: str) -> None:
    assert generation_of(names, text) == generation


def test_an_npu_counts_before_a_gpu() -> None:
    found = runner_of(A3, NVIDIA)
    assert (found.kind, found.generation, len(found.devices)) == ("npu", "A3", 2)
    assert found.notes == ("GPUs are there as well, and are not used",)
    assert runner_of(None, NVIDIA).kind == "cuda"
    assert runner_of(None, None) == Runner("none")
    assert runner_of("", "").notes == ("npu-smi  lists no NPU", "nvidia-smi lists no GPU")


def test_what_suites_can_use() -> None:
    assert runner_of(A2, None).has == {"npu"}
    ill = A2.replace("| OK ", "| Alarm ")
    assert runner_of(ill, None).has == frozenset()
    assert runner_of(ill, None).notes == ("NPU 0 (910B2) is not healthy", "NPU 1 (910B2) is not healthy")
    assert "2 x 910B2; Atlas A2" in runner_of(A2, None).describe()


def test_this_machine_is_detected() -> None:
    found = detect()
    assert found.cores >= 1 and found.machine
    assert (found.kind == "none") == (not found.devices)
    assert found.describe()
