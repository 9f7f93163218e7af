"""Ray Serve LLM's own configuration classes, in a process whose platform is that of NPUs. Without a cluster."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.install import RAY_PACKAGES, install_group
from tests.softnpu.processes import check_python

pytestmark = pytest.mark.softnpu

CODE = """
import json, os
from ray.serve.llm import LLMConfig

def describe(**options):
    try:
        config = LLMConfig(model_loading_config={"model_id": "m"}, **options)
        engine = config.get_engine_config()
        return {
            "kind": config.accelerator_config.kind,
            "bundles": engine.placement_bundles,
            "options": engine.accelerator.get_remote_options(config.accelerator_type),
            "backend": engine.get_initialization_kwargs()["distributed_executor_backend"],
            "share": engine.get_runtime_env_with_local_env_vars()["env_vars"].get("VLLM_RAY_PER_WORKER_GPUS"),
        }
    except ValueError as error:
        return str(error)

print("RESULT" + json.dumps([describe(**options) for options in json.loads(os.environ["CASES"])]))
"""
NPU = {"CPU": 1, "NPU": 1}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ranks": {"engine_kwargs": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    "type": {"accelerator_type": "Ascend910B3"},
    "bundles": {"placement_group_config": {"bundle_per_worker": NPU}},
    "bundles and ray": {
        "placement_group_config": {"bundles": [NPU]},
        "engine_kwargs": {"distributed_executor_backend": "ray"},
    },
    "bundles and mp": {
        "placement_group_config": {"bundles": [NPU]},
        "engine_kwargs": {"distributed_executor_backend": "mp"},
    },
    "bundles and type": {"placement_group_config": {"bundles": [NPU]}, "accelerator_type": "Ascend910_9391"},
    "share": {"placement_group_config": {"bundle_per_worker": {"CPU": 1, "NPU": 0.5}}},
    "gpus": {"placement_group_config": {"bundles": [{"GPU": 1}]}},
    "half gpus": {"placement_group_config": {"bundles": [{"GPU": 0.5}]}},
    "cpus": {"placement_group_config": {"bundles": [{"CPU": 1}]}},
    "tpu": {"accelerator_config": {"kind": "tpu"}, "placement_group_config": {"bundles": [NPU]}},
    "unknown type": {"accelerator_type": "Ascent910"},
}


def read_configs(**environment: str) -> dict[str, Any]:
    install_group("ray", Path(sys.prefix))
    path = os.pathsep.join([str(RAY_PACKAGES), os.environ["PYTHONPATH"]])
    output = check_python(CODE, PYTHONPATH=path, CASES=json.dumps(list(CASES.values())), **environment)
    found = next(line for line in output.splitlines() if line.startswith("RESULT"))
    return dict(zip(CASES, json.loads(found.removeprefix("RESULT")), strict=True))


def test_what_a_configuration_asks_of_the_cluster() -> None:
    found = read_configs()
    of_npus = {"kind": "gpu", "options": {"resources": {"NPU": 0.001}}, "backend": "ray", "share": None}
    assert found["nothing"] == {**of_npus, "bundles": [{"NPU": 1}]}
    assert found["ranks"] == {**of_npus, "bundles": [{"NPU": 1}] * 4}
    typed = {"NPU": 1, "accelerator_type:Ascend910B3": 0.001}
    options = {"resources": {"NPU": 0.001}, "accelerator_type": "Ascend910B3"}
    assert found["type"] == {**of_npus, "bundles": [typed], "options": options}
    assert found["bundles"] == found["bundles and ray"] == {**of_npus, "bundles": [NPU]}
    assert "distributed_executor_backend != 'ray' is not allowed" in found["bundles and mp"]
    assert found["bundles and type"]["bundles"] == [{**NPU, "accelerator_type:Ascend910_9391": 0.001}]
    assert found["share"] == {**of_npus, "bundles": [{"CPU": 1, "NPU": 0.5}], "share": "0.5"}
    assert found["gpus"]["bundles"] == [{"GPU": 1}] and found["half gpus"]["share"] == "0.5"
    assert found["cpus"]["kind"] == "cpu" and found["cpus"]["backend"] == "mp"
    assert found["tpu"]["options"] == {"resources": {}} and found["tpu"]["backend"] == "ray"
    assert "Unsupported accelerator type: Ascent910" in found["unknown type"]


def test_switched_off_ray_is_as_it_was() -> None:
    found = read_configs(VLLM_RAY_ASCEND="0")
    assert found["nothing"]["bundles"] == [{"GPU": 1}] and found["nothing"]["options"] == {"num_gpus": 0.001}
    assert found["bundles"]["kind"] == "cpu" and found["bundles"]["backend"] == "mp"
    assert "Unsupported accelerator type: Ascend910B3" in found["type"]
