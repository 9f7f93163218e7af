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
        if transfer := config.engine_kwargs.get("kv_transfer_config"):
            config.setup_engine_backend()
            return dict(transfer, backend=type(config.kv_connector_backend).__name__)
        return {
            "kind": config.accelerator_config.kind,
            "bundles": engine.placement_bundles,
            "options": engine.accelerator.get_remote_options(config.accelerator_type),
            "backend": engine.get_initialization_kwargs()["distributed_executor_backend"],
            "share": engine.get_runtime_env_with_local_env_vars()["env_vars"].get("VLLM_RAY_PER_WORKER_GPUS"),
        }
    except ValueError as error:
        return str(error)

from vllm_ray_ascend.compat.mooncake import settings_of_replica

replicas = [
    settings_of_replica(given, "10.0.0.1", offset, "abc")
    for given in ({}, {"kv_role": "kv_consumer"}, {"kv_port": 20000, "engine_id": "mine"})
    for offset in (0, 4)
]
print("REPLICAS" + json.dumps([[each["kv_port"], each["engine_id"]] for each in replicas]))
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
    "mooncake": {
        "engine_kwargs": {
            "data_parallel_rank": 1,
            "kv_transfer_config": {"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer"},
        }
    },
    "unknown type": {"accelerator_type": "Ascent910"},
}


def read_configs(**environment: str) -> tuple[dict[str, Any], Any]:
    """Return what each configuration means, by its name in CASES, and the settings of Mooncake's replicas."""
    install_group("ray", Path(sys.prefix))
    path = os.pathsep.join([str(RAY_PACKAGES), os.environ["PYTHONPATH"]])
    output = check_python(CODE, PYTHONPATH=path, CASES=json.dumps(list(CASES.values())), **environment)
    found, replicas = (
        json.loads(next(line for line in output.splitlines() if line.startswith(name)).removeprefix(name))
        for name in ("RESULT", "REPLICAS")
    )
    return dict(zip(CASES, found, strict=True)), replicas


def test_what_a_configuration_asks_of_the_cluster() -> None:
    found, replicas = read_configs()
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
    assert found["mooncake"]["backend"] == "MooncakeBackend" and found["mooncake"]["kv_port"] == 31000
    assert found["mooncake"]["engine_id"].endswith("-31000"), "a name that no other replica has"
    assert replicas == [
        [30000, "abc-10.0.0.1-30000"],
        [30004, "abc-10.0.0.1-30004"],
        [31000, "abc-10.0.0.1-31000"],
        [31004, "abc-10.0.0.1-31004"],
        [20000, "mine-10.0.0.1-20000"],
        [20004, "mine-10.0.0.1-20004"],
    ]
    assert "Unsupported accelerator type: Ascent910" in found["unknown type"]


def test_switched_off_ray_is_as_it_was() -> None:
    found, _ = read_configs(VLLM_RAY_ASCEND="0")
    assert found["nothing"]["bundles"] == [{"GPU": 1}] and found["nothing"]["options"] == {"num_gpus": 0.001}
    assert found["bundles"]["kind"] == "cpu" and found["bundles"]["backend"] == "mp"
    assert found["mooncake"]["backend"] == "DefaultConnectorBackend" and "kv_port" not in found["mooncake"]
    assert "Unsupported accelerator type: Ascend910B3" in found["type"]
