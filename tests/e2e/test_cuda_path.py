"""What a CUDA machine gets, as far as it can be run without a GPU: our executor, GPUs in Ray's groups, workers' GPUs.

What needs a GPU is in tests/hardware/test_cuda.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.cuda_machine import MARKER

pytestmark = pytest.mark.e2e


def run_case(machine: str, case: str, active: str, **variables: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "ASCEND_"))}
    environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "VLLM_RAY_ASCEND": active, **variables}
    environment |= {"VLLM_RAY_ASCEND_NPU_WAIT_S": "2", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.e2e.cuda_machine", machine, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and lines, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARKER))
    return found


def test_on_request_our_executor_is_chosen_for_vllms_cuda_platform() -> None:
    assert run_case("cuda", "choice", "1") == {
        "classes": ["RayAscendExecutor", "RayAscendEngineActorManager", "RayAscendEngineCoreActor"],
        "early": False,
        "actor": {"num_gpus": 1.0},
    }


def test_without_a_request_a_cuda_machine_is_unchanged() -> None:
    assert run_case("cuda", "choice", "auto")["classes"] == [
        "RayExecutorV2",
        "CoreEngineActorManager",
        "EngineCoreActor",
    ]


def test_the_error_on_an_unsupported_machine_names_both_platforms() -> None:
    error = run_case("cpu", "refused", "1")["error"]
    assert error.startswith(
        "NotActiveError: VRA-108: VLLM_RAY_ASCEND=1 asks for vllm-ray-ascend, but vLLM's platform is CpuPlatform"
    )
    assert "NPUPlatform" in error and "CudaPlatform" in error


def test_an_engines_gpus_and_its_workers() -> None:
    found = run_case("cuda", "placement", "1")
    assert found["bundles"] == [{"GPU": 1.0}] * 2
    assert found["assigned"] == [[0], [1]]
    assert found["held"] == [[0, 2]]
    busy, too_many = found["errors"]
    assert busy.startswith(
        "ClusterResourceError: VRA-244: The engine needs 1 GPUs (--tensor-parallel-size 1), the Ray cluster has 2"
    )
    assert "0 of them free" in busy and "placement group cuda_dp0" in busy
    assert too_many.startswith("ClusterResourceError: VRA-243: The engine needs 3 GPUs (--tensor-parallel-size 3)")
    assert "NPU" not in busy.replace("VLLM_RAY_ASCEND_NPU_WAIT_S", "")
    assert "NPU" not in too_many.replace("VLLM_RAY_ASCEND_NPU_WAIT_S", "")
